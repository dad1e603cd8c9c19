"""Memory is used again, and never while somebody still looks at it."""

import gc
import multiprocessing
import threading

import numpy as np

from alexnet_jax.data import buffers


def test_a_batch_that_nobody_holds_gives_its_memory_to_the_next():
    made = buffers.Images((2, 3))
    first = made(0)
    place = first.ctypes.data
    assert made(0) is first
    assert made.take(0) is first
    assert made(1).ctypes.data != place  # it is still held
    del first
    gc.collect()
    assert made(2).ctypes.data == place


def test_a_view_of_a_batch_keeps_its_memory():
    made = buffers.Images((4, 3))
    made(0)[:] = 7
    view = made.take(0)[1:][:, ::-1]
    gc.collect()
    for step in range(1, 5):
        made(step)[:] = step
    assert (view == 7).all()


def write(slots: buffers.Slots, numbers: list[int], written) -> None:
    for number in numbers:
        slots.free(number)[:] = number
        written.put(number)


def test_pieces_of_other_processes_arrive_whole_and_in_order():
    slots = buffers.Slots(3, (5, 2))
    context = multiprocessing.get_context("spawn")
    queues = [context.Queue(), context.Queue()]
    writers = [
        context.Process(target=write, args=(slots, list(range(first, 20, 2)), queues[first]))
        for first in (0, 1)
    ]
    for writer in writers:
        writer.start()
    out = np.full((5, 2), 99, np.uint8)
    for number in range(20):
        assert queues[number % 2].get(timeout=30) == number
        slots.copy(number, out)
        assert (out == number).all()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    slots.close()


def test_a_slot_is_waited_for_until_its_piece_was_copied():
    slots = buffers.Slots(2, (1,))
    found = []
    waiter = threading.Thread(target=lambda: found.append(slots.free(2)))
    waiter.start()
    waiter.join(0.1)
    assert waiter.is_alive()
    slots.copy(0, np.zeros(1, np.uint8))
    waiter.join(5)
    assert len(found) == 1
    slots.close()


def test_nobody_waits_for_what_is_closed():
    slots = buffers.Slots(2, (1,))
    slots.close()
    assert slots.free(1000).shape == (1,)
