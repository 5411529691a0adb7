"""FedZip on the wire: bytes with a version, counts and a checksum, made and read by numpy alone.

All numbers are little endian. A tree is `FZT1`, the number of leaves (u32), the CRC-32 of their
names and shapes (u32), and one message per leaf, in the order of `jax.tree.leaves`:

| bytes | what |
|---|---|
| 4 | `FZ01` |
| 1 | method: 0 raw, 1 huffman, 2 position, 3 dat, 4 merged, 5 elias_gamma |
| 1 | flags: bit 0 says that zeros decode to zero; the others are 0 |
| 1 | dtype of the tensor: 0 float32, 1 bfloat16, 2 float16 |
| 1 | K, number of labels; 0 for raw |
| 4 | n, number of elements |
| 4 K | centroids, float32 |
| 4 K | how often each label occurs |
| 4 | length of the payload |
| | payload |
| 4 | CRC-32 of everything from `FZ01` on |

The most frequent label (the lowest of several) is implicit. Bits go from the most significant of a
byte to the least; unused bits of the last byte are 0. A gap g is the distance to the previous
position of the same list, the first one counted from -1. Payloads:

- raw: n float32.
- huffman: the length of each label's canonical code word (K x u8; 0 if it does not occur or is
  alone), then the first bits of all words, the second bits of all words that have one, and so on.
- position: the width ceil(log2 n) (u8), then of each other label the positions in that width.
- dat: a Rice parameter r of each other label (u8), then of each other label: all quotients
  (g - 1) >> r in unary (zeros and a one), all remainders in r bits.
- merged: one r (u8), the code lengths (K x u8), the gaps of all other labels in one list as in dat,
  then their Huffman code.
- elias_gamma: of each other label: floor(log2 g) in unary of every gap, then their low bits.

Keeping the parts of code words together makes both directions vector operations and changes no
size.
"""

from jaxcomm.compressors.fedzip_codec._bits import FedZipError
from jaxcomm.compressors.fedzip_codec._message import decode_tensor, encode_tensor
from jaxcomm.compressors.fedzip_codec._report import LeafReport, compression_report
from jaxcomm.compressors.fedzip_codec._tree import decode, encode

__all__ = [
  "FedZipError",
  "LeafReport",
  "compression_report",
  "decode",
  "decode_tensor",
  "encode",
  "encode_tensor",
]
