"""A site's GPUs for FLARE's scheduler: FLARE's own manager, which names no reason when it says no.

FLARE shows the reason to whoever submitted the job, in the job's `schedule_history`, beside the site's name.
"""

from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.app_common.resource_managers.gpu_resource_manager import GPUResourceManager


class Gpus(GPUResourceManager):
    """Named by `local/resources.json.default` as `resource_manager`; takes the arguments of FLARE's."""

    def check_resources(self, resource_requirement: dict[str, Any], fl_ctx: FLContext) -> tuple[bool, str]:
        """Reserve what a job asks for.

        Args:
            resource_requirement: what the job asks of this site; `num_of_gpus`, perhaps `mem_per_gpu_in_GiB`.
            fl_ctx: of FLARE.

        Returns:
            Whether the site has it free; and the reservation's token, or why there is none.
        """
        free, token = super().check_resources(resource_requirement, fl_ctx)
        wish = ", ".join(f"{key}={value}" for key, value in sorted(resource_requirement.items()))
        return free, token or f"the job asks for {wish}, which this site does not have free"
