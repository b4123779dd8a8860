"""inflate: turn a Stable Diffusion checkpoint into a video model, and fine-tune it.

Import what you need from its module, for example `from inflate.families.svd import SVD`; this package itself imports
nothing heavy, so that the command line answers at once.
"""

import logging

# Without torchvision transformers tells whoever imports its image processor, as diffusers does, that it took the one of
# Pillow, which is ours anyway; this must stand before anything imports it.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)

__version__ = "0.1.0"
