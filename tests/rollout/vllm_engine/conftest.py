"""Environment of tests that start vLLM."""

import os

# read when vllm is imported; one thread, because threads that spin on shared cores make runs ten
# times slower
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
