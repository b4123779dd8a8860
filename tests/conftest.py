"""Set before torch is imported: one thread per process (xdist runs several), no network, no window."""

import os

os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "GOMP_SPINCOUNT": "0",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "Agg",
        "ACCELERATE_USE_CPU": "true",
        "NO_COLOR": "1",
    }
)
