"""Whether the GPUs of a Ray session can decode JPEGs, found out before anything expensive. Imports Ray inside functions only."""

from pipeline.cache.config import Decoder
from pipeline.errors import UserError, blame_field
from pipeline.imaging.gpu_decode import NO_GPU, check_nvjpeg
from pipeline.runtime.ray_session import gpu_nodes, is_in_process


def check_decoder(field: str, decoder: Decoder) -> None:
    """Decode a JPEG on a GPU of every node that has one, if `decoder` is ``nvjpeg``.

    Raises:
        UserError: if there is no GPU, one cannot decode, or GPUs or versions differ, which decide the pixels; names the field.
    """
    if decoder == "cpu":
        return
    with blame_field(field):
        found = sorted({*_on_every_node()})
        if not found:
            raise UserError(NO_GPU)
        if len(found) > 1:
            raise UserError(
                f"nvjpeg gives other pixels on other GPUs and with other versions, and the nodes have {'; '.join(found)}: "
                "use nodes of one kind, or set it to cpu"
            )


def _on_every_node() -> list[str]:
    """What `check_nvjpeg` tells on each node with a GPU."""
    if is_in_process():
        return [check_nvjpeg()]
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    checked = ray.remote(num_gpus=1, num_cpus=0)(_checked)
    places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in gpu_nodes()]
    answers = ray.get([checked.options(scheduling_strategy=place).remote() for place in places])
    for error in (error for _, error in answers if error):
        raise UserError(error)
    return [found for found, _ in answers]


def _checked() -> tuple[str, str]:
    """What `check_nvjpeg` returns, and "", or "" and its error."""
    try:
        return check_nvjpeg(), ""
    except UserError as error:
        return "", str(error)
