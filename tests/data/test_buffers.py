"""Memory is used again, and never while somebody still looks at it."""

import gc
import multiprocessing
import threading

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


def write(slots: buffers.Slots, row: int, numbers: list[int], written) -> None:
    for number in numbers:
        slots(number)[row] = number
        written.put(number)


def test_batches_of_other_processes_arrive_whole_and_in_order():
    """Each of two processes writes a row of every batch."""
    slots = buffers.Slots(2, (2, 1000))
    context = multiprocessing.get_context("spawn")
    queues = [context.Queue(), context.Queue()]
    writers = [
        context.Process(target=write, args=(slots, row, list(range(30)), queues[row]))
        for row in (0, 1)
    ]
    for writer in writers:
        writer.start()
    held = {}
    for number in range(30):
        for queue in queues:
            assert queue.get(timeout=30) == number
        batch = slots.take(number)
        assert (batch == number).all()
        if number % 7 < 2:  # some are held for long, more than may be lent
            held[number] = batch[:, ::-1]
    for number, view in held.items():
        assert (view == number).all()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    slots.close()


def test_a_batch_in_nobodys_hands_gives_its_slot_to_the_next_that_has_none():
    slots = buffers.Slots(1, (1,))
    last = 1 + buffers.LENT  # the first that has no slot
    found = []
    waiter = threading.Thread(target=lambda: found.append(slots(last)))
    waiter.start()
    batch = slots.take(0)
    place = batch.ctypes.data
    waiter.join(0.1)
    assert waiter.is_alive()
    del batch
    gc.collect()
    waiter.join(5)
    assert [array.ctypes.data for array in found] == [place]
    slots.close()


def test_however_many_batches_are_held_there_is_one_to_write():
    slots = buffers.Slots(1, (4,))
    held = []
    for number in range(10):
        slots(number)[:] = number
        held.append(slots.take(number))
    assert [batch.tolist() for batch in held] == [[number] * 4 for number in range(10)]
    slots.close()


def test_what_is_held_stays_when_all_else_is_closed():
    slots = buffers.Slots(1, (4,))
    slots(0)[:] = 5
    held = slots.take(0)
    slots.close()
    slots(1)[:] = 6
    del slots
    gc.collect()
    assert (held == 5).all()
