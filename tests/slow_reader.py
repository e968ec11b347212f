# SPDX-License-Identifier: Apache-2.0
"""A second reader of the blob, written from docs/file-format.md alone: no numpy, one entry a time.

It believes what it reads; that a damaged blob is refused is the library's business.
"""

import struct
import zlib

WIDTHS = {1: 4, 2: 2, 5: 2, 6: 2, 7: 4}  # bytes of a value, by mode
EXPONENTS = {5: (7, 0xFF), 6: (10, 0x1F)}  # modes against the base: shift, mask


def read(blob, base=None):
    """Return (mode, [(size, positions, bits of the values)]); base: bits for each tensor."""
    magic, version, _, mode, num_sections, block, num_tensors, *_ = struct.unpack_from(
        "<8sHHBBHIIQQ", blob
    )
    assert magic == b"SFADELTA"
    assert struct.unpack("<I", blob[-4:])[0] == zlib.crc32(blob[:-4])
    sections, offset = [], 40 + 20 * num_sections
    for i in range(num_sections):
        stored, expanded, codec = struct.unpack_from("<QQI", blob, 40 + 20 * i)
        data = blob[offset : offset + stored]
        sections.append(zlib.decompress(data, -15) if codec == 1 else data)
        assert len(sections[-1]) == expanded
        offset += stored
    heads = {1: 0, 2: 2}[version]  # sections before those of lists
    table = sections[heads]
    table = [struct.unpack_from("<QQQQQBB", table, at) for at in range(0, len(table), 42)]
    positions = _positions(table, *sections[heads + 1 : heads + 5])
    sizes = [row[0] for row in table]
    if version == 2:
        tensors = [struct.unpack_from("<QQI", sections[0], 20 * i) for i in range(num_tensors)]
        sizes = [size for size, _, _ in tensors]
        positions = _joined(tensors, list(sections[1]), sizes, positions)
    assert len(sizes) == len(positions) == num_tensors
    values = _values(mode, block, sections[heads + 5 :], [len(p) for p in positions], base)
    return mode, [(size, *pair) for size, *pair in zip(sizes, positions, values, strict=True)]


def _joined(tensors, classes, sizes, lists):
    """Return each tensor's positions: a list of its own, or out of the levels' lists."""
    own = iter(lists)
    found = [None if columns else next(own) for _, _, columns in tensors]
    levels = [[] for _ in range(64)]  # (tensor, position) of all weights of a level
    for ordinal, (size, entries, columns) in enumerate(tensors):
        if columns:
            rows = size // columns
            of_rows, of_columns = classes[:rows], classes[rows : rows + columns]
            classes = classes[rows + columns :]
            found[ordinal] = []
            for position in range(size):
                row, column = of_rows[position // columns], of_columns[position % columns]
                if row and column:
                    level = max(0, min(63, (entries**2).bit_length() + 4 - row - column))
                    levels[level].append((ordinal, position))
    for level in filter(None, levels):
        for place in next(own):
            ordinal, position = level[place]
            found[ordinal].append(position)
    return [sorted(positions) for positions in found]


def _positions(table, skip_symbols, skip_bits, length_symbols, length_bits):
    skips = _numbers(skip_symbols, skip_bits, table, [(row[2], row[5]) for row in table])
    has_lengths = [row[2] < row[1] for row in table]
    lengths = _numbers(
        length_symbols,
        length_bits,
        table,
        [(row[2] if has else 0, row[6]) for row, has in zip(table, has_lengths, strict=True)],
    )
    found = []
    for i in range(len(table)):
        here, positions = 0, []
        for skip, more in zip(skips[i], lengths[i] or [0] * len(skips[i]), strict=True):
            here += skip
            positions += range(here, here + more + 1)
            here += more + 1
        found.append(positions)
    return found


def _numbers(symbols, low_bits, table, shapes):
    """Return each tensor's list; shapes: its number of numbers, and its shift."""
    symbols, offset, found = iter(symbols), 0, [[] for _ in table]
    order = sorted(range(len(table)), key=lambda i: -((table[i][2] << 32) // max(table[i][0], 1)))
    for i in order:
        n, shift = shapes[i]
        plane = (n + 7) // 8
        low = low_bits[offset : offset + shift * plane]
        offset += shift * plane
        found[i] = [_number(symbols, low, plane, shift, k) for k in range(n)]
    return found


def _number(symbols, low, plane, shift, k):
    high = 0
    while (symbol := next(symbols)) == 255:
        high += 255
    number = (high + symbol) << shift
    for bit in range(shift):
        number |= (low[bit * plane + k // 8] >> (k % 8) & 1) << bit
    return number


def _values(mode, block, planes, counts, base):
    width, total = WIDTHS[mode], sum(counts)
    if mode == 7:
        flat = _int8(planes, counts, block)
    else:
        codes = [sum(planes[b][i] << (8 * b) for b in range(width)) for i in range(total)]
        if mode in EXPONENTS:
            shift, mask = EXPONENTS[mode]
            bases = [bits for tensor in base for bits in tensor]
            order = sorted(range(total), key=lambda i: bases[i] >> shift & mask)
            flat = [0] * total
            for code, i in zip(codes, order, strict=True):
                flat[i] = _step(bases[i], code, 8 * width)
        else:
            flat = [code >> 1 | (code & 1) << (8 * width - 1) for code in codes]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [flat[a : a + n] for a, n in zip(starts, counts, strict=True)]


def _step(base, zigzag, bits):
    sign = 1 << (bits - 1)
    steps = zigzag // 2 if zigzag % 2 == 0 else -(zigzag + 1) // 2
    ordered = (2 * sign - 1 - base if base & sign else base + sign) + steps
    ordered %= 2 * sign
    return ordered - sign if ordered & sign else 2 * sign - 1 - ordered


def _int8(planes, counts, block):
    quotients = list(struct.unpack(f"{len(planes[0])}b", planes[0]))
    flat, at, which = [], 0, 0
    for count in counts:
        for first in range(0, count, block):
            code = sum(planes[1 + b][which] << (8 * b) for b in range(4))
            largest = struct.unpack("<f", struct.pack("<I", code >> 1 | (code & 1) << 31))[0]
            for _ in range(min(block, count - first)):
                value = quotients[at] * largest / 127.0
                flat.append(struct.unpack("<I", struct.pack("<f", value))[0])
                at += 1
            which += 1
    return flat
