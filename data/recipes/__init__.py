"""One module per data set family, plus shared modules; `record.py` describes a recipe's form."""
