"""A picture of coloured pixels, as much of one as a line chart needs, and its PNG."""

import struct
import zlib
from typing import Final, final

Colour = tuple[int, int, int]

# Each letter is five rows of three pixels, as octal digits from the top: 7 is a full row, 5 its two ends.
_LETTERS: Final[dict[str, str]] = {
    "0": "75557",
    "1": "26227",
    "2": "71747",
    "3": "71717",
    "4": "55711",
    "5": "74717",
    "6": "74757",
    "7": "71122",
    "8": "75757",
    "9": "75717",
    ".": "00002",
    ",": "00024",
    ":": "02020",
    "-": "00700",
    "/": "11244",
    "A": "25755",
    "B": "65656",
    "C": "34443",
    "D": "65556",
    "E": "74647",
    "F": "74644",
    "G": "34553",
    "H": "55755",
    "I": "72227",
    "J": "11152",
    "K": "55655",
    "L": "44447",
    "M": "57755",
    "N": "65555",
    "O": "25552",
    "P": "65644",
    "Q": "25563",
    "R": "65655",
    "S": "34216",
    "T": "72222",
    "U": "55557",
    "V": "55552",
    "W": "55775",
    "X": "55255",
    "Y": "55222",
    "Z": "71247",
    "%": "51245",
    "(": "12221",
    ")": "42224",
    "+": "02720",
    "_": "00007",
    " ": "00000",
}
_BITS: Final = (4, 2, 1)


@final
class Picture:
    """Pixels on a white ground; the origin is the upper left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.width = width
        self.height = height
        self._pixels = bytearray(b"\xff" * (3 * width * height))

    def fill(self, left: int, top: int, right: int, bottom: int, colour: Colour) -> None:
        """Fill a rectangle; its right and bottom edges are not part of it."""
        left, right = max(0, left), min(self.width, right)
        row = bytes(colour) * max(0, right - left)
        for y in range(max(0, top), min(self.height, bottom)):
            start = 3 * (y * self.width + left)
            self._pixels[start : start + len(row)] = row

    def line(self, from_x: float, from_y: float, to_x: float, to_y: float, colour: Colour) -> None:
        """Draw a line two pixels thick."""
        steps = max(1, round(max(abs(to_x - from_x), abs(to_y - from_y))))
        for step in range(steps + 1):
            x = round(from_x + (to_x - from_x) * step / steps)
            y = round(from_y + (to_y - from_y) * step / steps)
            self.fill(x, y, x + 2, y + 2, colour)

    def text(self, left: int, top: int, words: str, colour: Colour, *, scale: int = 2) -> None:
        """Write words in capitals; what there is no letter for is left blank."""
        for number, letter in enumerate(words.upper()):
            for row, digit in enumerate(_LETTERS.get(letter, _LETTERS[" "])):
                for column, bit in enumerate(_BITS):
                    if int(digit) & bit:
                        x, y = left + scale * (4 * number + column), top + scale * row
                        self.fill(x, y, x + scale, y + scale, colour)

    def png(self) -> bytes:
        """Return the picture as PNG (W3C, third edition): one image, eight bits a channel, no filters."""
        stride = 3 * self.width
        rows = b"".join(b"\0" + self._pixels[y * stride : (y + 1) * stride] for y in range(self.height))
        header = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in chunks)


def text_width(words: str, *, scale: int = 2) -> int:
    """Return how many pixels words take."""
    return scale * (4 * len(words) - 1)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
