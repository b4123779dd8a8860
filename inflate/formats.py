"""The names of formats, without which `--help` could not list them."""

FORMATS = {
    "stable-diffusion-file": "Stable Diffusion, a single file",
    "stable-diffusion": "Stable Diffusion, diffusers' folder",
    "svd-file": "Stable Video Diffusion, the original's single file",
    "svd": "Stable Video Diffusion, diffusers' folder; an export of image-to-video is one",
    "dynamicrafter-file": "DynamiCrafter, the original's single file",
    "dynamicrafter": "DynamiCrafter, our folder",
    "videocrafter-file": "VideoCrafter's text-to-video, the original's single file",
    "video-unet": "a UNet of ours with its temporal layers; an export of text-to-video has one",
    "temporal-layers": "temporal layers alone, of an export of text-to-video or image-to-video",
    "unet3d": "ModelScope or ZeroScope, diffusers' UNet3DConditionModel",
    "vgen": "ModelScope's text-to-video or the refinement of I2VGen-XL, a UNet's file in VGen's names",
    "i2vgen_xl-file": "I2VGen-XL or ModelScope's image-to-video, a UNet's file in VGen's names",
    "i2vgen_xl": "I2VGen-XL, our folder",
    "i2vgen_xl_refiner": "the refinement of I2VGen-XL, our folder",
    "unet-i2vgen": "I2VGen-XL, diffusers' I2VGenXLUNet; the folder of a pipeline has one",
    "unet-motion": "AnimateDiff, diffusers' UNetMotionModel",
    "motion-adapter": "AnimateDiff, diffusers' MotionAdapter",
    "motion-module": "AnimateDiff, a file of motion modules in the original names",
    "image-stream": "an image stream alone, the export of stage=context: stage=adapt of a run makes a model of it",
    "checkpoint": "a checkpoint of a run, whose model is in the run's export",
}
"""Every format that is known, and what it is."""

UNETS = (
    "video-unet", "unet3d", "vgen", "i2vgen_xl-file", "unet-i2vgen", "unet-motion", "motion-adapter", "motion-module"
)  # fmt: skip
"""The formats in which the UNet of a video model is written."""
WRITTEN = (
    "stable-diffusion",
    "stable-diffusion-file",
    "svd",
    "svd-file",
    "dynamicrafter",
    "dynamicrafter-file",
    "i2vgen_xl",
    "i2vgen_xl_refiner",
    "temporal-layers",
    *UNETS,
)
"""The formats that are written."""
FILES = ("stable-diffusion-file", "svd-file", "dynamicrafter-file", "vgen", "i2vgen_xl-file", "motion-module")
"""Those of them that are one file."""

ADAPTERS = {
    "inflate": "PEFT, over the layers of our UNets, which are their image model's and those called temporal",
    "svd": "PEFT, over the layers of diffusers' UNetSpatioTemporalConditionModel",
    "unet3d": "PEFT, over the layers of diffusers' UNet3DConditionModel and I2VGenXLUNet",
    "unet-motion": "PEFT, over the layers of diffusers' UNetMotionModel",
    "comfyui": "ComfyUI, over the original names of the layers",
    "kohya": "kohya's scripts and what reads their files: lora_unet_..., lora_down, lora_up, alpha",
    "attention-processors": "diffusers before it used PEFT: ....lora.down.weight, ....lora.up.weight",
}
"""Every format of an adapter's file, and what it is."""
