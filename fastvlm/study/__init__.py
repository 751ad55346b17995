"""Studies: a paper's ablation as one command that ends in a verdict. `python -m fastvlm.study` makes the reports."""
