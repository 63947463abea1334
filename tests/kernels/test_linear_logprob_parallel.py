"""Vocabulary shards on two gloo ranks."""

import socket

import torch.multiprocessing as mp
from kernel_ranks import WORLD, check_rank


def test_two_vocabulary_shards_match_the_whole_vocabulary():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(check_rank, args=(port,), nprocs=WORLD)
