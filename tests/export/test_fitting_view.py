import torch

from casc.export.program import fitting_view
from casc.model.preprocess import ImageConfig, resized


def test_images_are_never_cut_off():
    generator = torch.Generator().manual_seed(0)
    size = torch.randint(1, 700, (500, 2), generator=generator)
    image, canvas = ImageConfig(short=96, long=160), (96, 128)
    view = fitting_view(size, image, canvas)
    usual = resized(size, image.short, image.long)
    fits = (usual <= torch.tensor(canvas)).all(dim=1)
    assert 0 < fits.sum() < 500
    assert torch.equal(view.size[fits], usual[fits])
    small = view.size[~fits]
    assert (small >= 1).all()
    assert (small <= torch.tensor(canvas)).all()
    assert ((small == torch.tensor(canvas)).any(dim=1)).all()
    # The aspect is kept to half a pixel of the shorter side.
    height, width = size[~fits].double().unbind(1)
    ratio = torch.minimum(canvas[0] / height, canvas[1] / width)
    exact = torch.stack([height * ratio, width * ratio], dim=1).clamp(min=1)
    assert (small - exact).abs().max() <= 0.5 + 1e-9
    assert view.corner is None
    assert not view.flip.any()
