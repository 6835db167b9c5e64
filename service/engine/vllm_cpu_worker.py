"""The worker on CPUs: apart, since vLLM's CPU worker can only be imported where its CPU build is installed."""

# isort: off
from vllm.v1.worker.cpu_worker import CPUWorker  # before anything else of vLLM's
from service.engine.vllm_worker import SidWorkerMixin
# isort: on


class SidCPUWorker(SidWorkerMixin, CPUWorker):  # type: ignore[misc]
    """On CPUs."""
