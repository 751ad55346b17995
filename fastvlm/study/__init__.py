"""Studies: rerun a paper's ablation with one command that ends in a verdict. `python -m fastvlm.study` reports them."""
