"""Processes that form a torch.distributed world and call functions on demand."""

import multiprocessing

import torch
import torch.distributed as dist


class Processes:
    """Ranks 0 to ``size - 1`` of a world, whose store is in the process of rank 0.

    Called with a function, arguments and, optionally, a dict of arguments for each rank, it returns what each call
    returned; where one raised, the exception's type and words; where a process ended, and of rank ``without``, None.
    """

    def __init__(self, size):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["fxmse"])  # which takes seconds to import
        pipes = [context.Pipe() for _ in range(size)]
        self._pipes = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, size, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self._processes, pipes, strict=True):
            process.start()
            theirs.close()
        port = self._pipes[0].recv()
        for pipe in self._pipes[1:]:
            pipe.send(port)

    def __call__(self, function, arguments=None, *, without=None, **common):
        for pipe, own in zip(self._pipes, arguments or [{}] * len(self._pipes), strict=True):
            pipe.send((function, {**common, **own}))
        return [None if rank == without else _receive(pipe) for rank, pipe in enumerate(self._pipes)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(1)
            process.kill()
            process.join()


def _receive(pipe):
    assert pipe.poll(60), "no answer within 60 s"
    try:
        return pipe.recv()
    except EOFError:
        return None


def _serve(rank, size, pipe):
    torch.set_num_threads(1)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        pipe.send(store.port)
    else:
        store = dist.TCPStore("127.0.0.1", pipe.recv(), is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    while True:
        try:
            function, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(function(**kwargs))
        except Exception as error:
            pipe.send((type(error).__name__, str(error)))
