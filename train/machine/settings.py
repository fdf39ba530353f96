"""Options of several processes."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Processes:
    """The number of processes, and the place of this one."""

    coordinator: str | None = None
    """HOST:PORT of process 0 of several; `auto` asks the cluster: SLURM, Open MPI,
    Kubernetes or a TPU pod."""
    num_processes: int | None = None
    """Number of processes on all hosts."""
    process_id: int | None = None
    """Number of this process, from 0."""
    join_seconds: int = 300
    """Seconds to wait until all have started."""
    dead_seconds: int = 60
    """Seconds of silence after which a process counts as dead, and the others end."""
