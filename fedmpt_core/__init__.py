"""FedMPT without any federated framework: model, data, training, evaluation."""

import os

# Intel MKL's default kernels round by where a matrix lies in memory: the gradient of a record would depend on those
# beside it, and the clipping bound would not bound what leaving one out changes. STRICT and COMPATIBLE kernels do not.
# MKL reads the variable at its first product, so importing this package is early enough in every process that trains.
# Source: oneMKL Developer Guide, "Obtaining Numerically Reproducible Results".
_KERNELS = os.environ.get("MKL_CBWR", "")
if not (_KERNELS.upper().endswith("STRICT") or _KERNELS.upper() == "COMPATIBLE"):
    os.environ["MKL_CBWR"] = "AUTO,STRICT"
