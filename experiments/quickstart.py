"""The core norms on a CNN, an RNN and a Transformer: the same images as pictures, as rows and as patches.

Run it with `normzoo run experiments/quickstart.py`.
"""

import normzoo as nz

study = nz.Study(
    name="quickstart",
    norms={
        "batch_norm": "batch_norm",
        "layer_norm": "layer_norm",
        "layer_norm_joint": "layer_norm_joint",
        "instance_norm": "instance_norm",
        "group_norm": "group_norm",
        "sync_batch_norm": "sync_batch_norm",  # one process: it must equal batch norm
        # the paper ramps its limits over tens of thousands of batches, these trainings have about fifty
        "batch_renorm": "batch_renorm(warmup=10, r_ramp=40, d_ramp=25, momentum=0.1)",
        "ghost_batch_norm": "ghost_batch_norm(ghost_batch_size=16)",
        "rms_norm": "rms_norm",
        "none": "none",
    },
    tasks=["digits/cnn", "digits/lstm_between", "digits/transformer"],
    settings=[{"epochs": 3}],  # a short training, where the speed that a norm lends still shows
    seeds=range(5),
    baseline="batch_norm",
)
