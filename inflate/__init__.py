"""inflate: turn a Stable Diffusion checkpoint into a video model, and fine-tune it.

Import what you need from its module, for example `from inflate.families.svd import SVD`; this package itself imports
nothing, so that the command line answers at once.
"""

__version__ = "0.1.0"
