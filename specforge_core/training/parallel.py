"""A draft on several processes, arranged from outside the model."""

from torch.distributed.device_mesh import init_device_mesh

from specforge_core.drafts.base import DraftModel
from specforge_core.manifest_sections import TrainingConfig
from specforge_core.training.optim import muon_parameters
from specforge_core.training.sharding import Layout, Sharding
from specforge_core.training.workers import Workers


def parallelize(draft: DraftModel, config: TrainingConfig, workers: Workers) -> Sharding:
    """What optimizers step in place of the draft's parameters; the draft lies on its device, the same everywhere."""
    if workers.world_size == 1:
        return Sharding(draft)
    everyone = Layout(init_device_mesh(workers.device.type, (workers.world_size,), mesh_dim_names=("data",)), ())
    layouts = {name: everyone for name, _ in draft.named_parameters()}
    return Sharding(draft, layouts, whole=muon_parameters(draft, config))
