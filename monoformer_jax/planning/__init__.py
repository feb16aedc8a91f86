"""What `plan` prints: a program compiled for TPU on this machine, and what the compiler says of it."""

# The environment in which libtpu loads without a TPU and asks no metadata server.
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
