"""Pictures of attention weights: heat maps, a page of token links, overlays on images, alignments of speech to text.

Everything here takes plain arrays of weights, as `fastattn.attention_weights` and `fastattn.capture` give them.
Pictures are matplotlib figures (`figure.savefig("name.png")`), the page is one HTML file that needs nothing else.
"""

from .aligning import align
from .alignment import alignment
from .heat_map import heat_map
from .links import links
from .overlay import overlay

__all__ = ["align", "alignment", "heat_map", "links", "overlay"]
