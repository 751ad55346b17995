import logging

# What libraries that we use for something else say of themselves on import is nothing a user can act on: torchao of its
# enums (transformers imports it where it is installed), bitsandbytes of kernels it would like to fetch.
for _name in ("torch.utils._pytree", "bitsandbytes"):
    logging.getLogger(_name).setLevel(logging.ERROR)
