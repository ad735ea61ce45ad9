"""Pictures of instances: boxes, masks, names and scores on photographs.

Sizes of lines and letters follow the picture's size, so that a picture fitted to a
screen or a page looks alike whatever its resolution.
"""

from casc.draw.instances import draw_instances
from casc.draw.samples import draw_sample
from casc.draw.sheet import contact_sheet
from casc.draw.style import class_colour

__all__ = ["class_colour", "contact_sheet", "draw_instances", "draw_sample"]
