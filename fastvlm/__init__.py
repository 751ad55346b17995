import logging

# Silence import-time messages that users cannot act on: about torchao's enums (transformers imports it if installed),
# and about kernels that bitsandbytes would like to download.
for _name in ("torch.utils._pytree", "bitsandbytes"):
    logging.getLogger(_name).setLevel(logging.ERROR)
