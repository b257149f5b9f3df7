"""Pictures of what was found: colours where they belong, sizes, legends."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from visionattn.tasks.dense.drawing import class_colour, draw_classes, draw_objects, in_square


def test_boxes_and_masks_are_drawn_where_they_are():
    image = Image.new("RGB", (96, 64), (100, 100, 100))
    masks = torch.zeros(1, 64, 96, dtype=torch.bool)
    masks[:, 20:40, 30:60] = True
    drawn = np.asarray(draw_objects(image, torch.tensor([[10.0, 8, 80, 56]]), [3], ["three 0.97"], masks))
    assert drawn.shape == (256, 384, 3)  # four times as large
    colour = np.array(class_colour(3))
    assert np.array_equal(drawn[200, 40], colour)  # on the left side of the box
    assert np.array_equal(drawn[5, 5], [100, 100, 100])
    assert np.abs(drawn[120, 180] - (colour + 100.0) / 2).max() <= 2  # half of the mask
    assert np.array_equal(drawn[48, 300], [100, 100, 100])
    large = Image.new("RGB", (500, 400))
    nothing = draw_objects(large, torch.zeros(0, 4), [], [], torch.zeros(0, 400, 500, dtype=torch.bool))
    assert nothing.tobytes() == large.tobytes()


def test_classes_have_colours_and_a_legend():
    image = Image.new("RGB", (400, 200), (100, 100, 100))
    classes = torch.zeros(200, 400, dtype=torch.long)
    classes[:, 100:200], classes[:, 200:300], classes[:, 300:] = 1, 2, 255
    drawn = np.asarray(draw_classes(image, classes, ["nothing", "a cat", "a dog"], clear=0))
    assert drawn.shape[1] == 400
    assert drawn.shape[0] > 210
    assert np.array_equal(drawn[100, 50], [100, 100, 100])
    assert np.array_equal(drawn[100, 350], [100, 100, 100])
    for x, index in ((150, 1), (250, 2)):
        expected = 0.6 * np.array(class_colour(index)) + 40
        assert np.abs(drawn[100, x] - expected).max() <= 2
        assert (drawn[200:].reshape(-1, 3) == class_colour(index)).all(1).any()
    assert not (drawn[200:].reshape(-1, 3) == class_colour(0)).all(1).any()


def test_colours_differ():
    colours = {class_colour(index) for index in range(150)}
    assert len(colours) == 150


def test_panels_are_square():
    square = in_square(Image.new("RGB", (30, 50), "teal"))
    assert square.size == (50, 50)
    assert square.getpixel((2, 25)) == (255, 255, 255)
    assert square.getpixel((25, 25)) == (0, 128, 128)
