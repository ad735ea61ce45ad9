import numpy as np
import pytest
import torch

from casc.data.collate import block_size, collate, unpack
from casc.data.index import Bucket
from casc.data.sample import Sample, polygon_edges
from casc.errors import UserError

BUCKET = Bucket("w", 1.0, None, height=6, width=8, instances=2, edges=8, samples=2)
SQUARE = [[1.0, 1.0, 3.0, 1.0, 3.0, 4.0, 1.0, 4.0]]


def sample(image_id=7, height=5, width=7, objects=1, polygon=SQUARE) -> Sample:
    return Sample(
        image=np.full((height, width, 3), image_id, np.uint8),
        boxes=np.tile(np.array([[1, 1, 3, 4]], np.float32), (objects, 1)),
        labels=np.full(objects, 3, np.int64),
        edges=[polygon_edges(polygon)] * objects,
        segmentations=[polygon] * objects,
        image_id=image_id,
    )


def test_pads_to_the_buckets_capacities():
    batch = collate([sample(7), sample(9, objects=0)], BUCKET, batch=3, seeds=[11, 12])
    assert batch.image.shape == (3, 6, 8, 3)
    assert batch.image.numpy().sum(axis=(1, 2, 3)).tolist() == [5 * 7 * 3 * 7, 5 * 7 * 3 * 9, 0]
    assert (batch.image[0, :5, :7] == 7).all()
    assert batch.size.tolist() == [[5, 7], [5, 7], [1, 1]]
    assert batch.valid.tolist() == [[True, False], [False, False], [False, False]]
    assert batch.boxes[0].tolist() == [[1, 1, 3, 4], [0, 0, 0, 0]]
    assert batch.labels.tolist() == [[3, 0], [0, 0], [0, 0]]
    assert batch.edges.shape == (3, 8, 4)
    assert batch.edges[0, :4].tolist() == [[1, 1, 3, 1], [3, 1, 3, 4], [3, 4, 1, 4], [1, 4, 1, 1]]
    assert (batch.edges[0, 4:] == 0).all()
    assert (batch.edge_gt == 0).all()
    assert batch.image_id.tolist() == [7, 9, -1]
    assert batch.seed.tolist() == [11, 12, 0]
    assert batch.bitmaps is None


def test_edges_are_packed_one_object_after_another():
    triangle = polygon_edges([[0, 0, 2, 0, 2, 2]])
    two = sample(objects=2)._replace(edges=[triangle, polygon_edges(SQUARE)])
    batch = collate([two], BUCKET)
    assert batch.edge_gt[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 0]
    assert torch.equal(batch.edges[0, :3], torch.from_numpy(triangle))
    assert torch.equal(batch.edges[0, 3:7], torch.from_numpy(polygon_edges(SQUARE)))


def test_bitmaps_are_cocos():
    rle = {"size": [5, 7], "counts": [6, 3, 26]}  # column 1, rows 1 to 3, column by column
    batch = collate([sample()._replace(segmentations=[SQUARE])], BUCKET, bitmaps=True)
    assert batch.bitmaps is not None
    assert batch.bitmaps.shape == (1, 2, 6, 8)
    assert batch.bitmaps[0, 0].numpy().sum() == 6
    assert (batch.bitmaps[0, 0, 1:4, 1:3] == 1).all()
    batch = collate([sample()._replace(segmentations=[rle])], BUCKET, bitmaps=True)
    assert batch.bitmaps is not None
    assert batch.bitmaps[0, 0].nonzero().tolist() == [[1, 1], [2, 1], [3, 1]]


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        (sample(height=7), "height is 7"),
        (sample(width=9), "width is 9"),
        (sample(objects=3), "instances is 3"),
        (sample(objects=2, polygon=[[0, 0, 4, 0, 4, 2, 3, 4, 0, 4]]), "edges is 10"),
    ],
)
def test_more_than_the_index_says(bad, name):
    with pytest.raises(UserError, match=f"image 7: {name}, .* bucket w"):
        collate([bad], BUCKET)


def test_too_many_samples():
    with pytest.raises(ValueError, match="batch of 1"):
        collate([sample(), sample()], BUCKET, batch=1)


@pytest.mark.parametrize("bitmaps", [False, True])
@pytest.mark.parametrize("spare", [0, 128])
def test_memory_of_any_content_will_do(bitmaps, spare):
    samples = [sample(7, 4, 6), sample(9, objects=0), sample(8, 6, 8, objects=2)]
    clean = collate(samples, BUCKET, batch=4, seeds=[1, 2, 3], bitmaps=bitmaps)
    size = block_size(BUCKET, 4, bitmaps=bitmaps)
    block = torch.full((size + spare,), 0xAB, dtype=torch.uint8)
    again = collate(samples, BUCKET, batch=4, seeds=[1, 2, 3], bitmaps=bitmaps, block=block)
    # What padding is, said by hand.
    assert (again.image[0, 4:] == 0).all()
    assert (again.image[0, :, 6:] == 0).all()
    assert (again.image[3] == 0).all()
    for column, expected in zip(again, clean, strict=True):
        assert (column is None) == (expected is None)
        assert column is None or (expected is not None and torch.equal(column, expected))
    assert (block[size:] == 0xAB).all()


@pytest.mark.parametrize("bitmaps", [False, True])
def test_a_batch_is_one_block_that_can_be_copied_and_unpacked(bitmaps):
    size = block_size(BUCKET, 2, bitmaps=bitmaps)
    # Somewhere inside of other memory, as a worker's blocks are.
    block = torch.zeros(3, size, dtype=torch.uint8)[1]
    samples = [sample(7), sample(9, objects=2)]
    batch = collate(samples, BUCKET, seeds=[5, 6], bitmaps=bitmaps, block=block)
    copy = block.clone()
    block.fill_(1)
    assert (batch.image == 1).all()  # its columns are views of the block
    again = unpack(copy, BUCKET, 2, bitmaps=bitmaps)
    expected = collate(samples, BUCKET, seeds=[5, 6], bitmaps=bitmaps)
    for column, wanted in zip(again, expected, strict=True):
        assert (column is None) == (wanted is None)
        if column is not None and wanted is not None:
            assert column.dtype == wanted.dtype
            assert (column.data_ptr() - copy.data_ptr()) % 64 == 0
            assert torch.equal(column, wanted)
