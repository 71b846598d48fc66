"""Makes tests/pictures/kinds: small pictures of every kind that people have, each with what Pillow makes of it.

    pip install pillow && python tests/pictures/make.py

NAME.ppm holds the RGB pixels of the picture NAME, on white where it is transparent.
"""

import pathlib
import struct
import zlib

from PIL import Image, ImageCms, ImageOps

FOLDER = pathlib.Path(__file__).parent / "kinds"
WIDTH, HEIGHT = 24, 16
PASSES = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]


def pixel(x, y):
    """Smooth, and different in every corner."""
    return (40 + 8 * x, 230 - 12 * y, 20 + 4 * x + 6 * y)


def alpha(x, y):
    return (x * 11 + y * 3) % 256


def picture(mode="RGB"):
    image = Image.new("RGB", (WIDTH, HEIGHT))
    image.putdata([pixel(x, y) for y in range(HEIGHT) for x in range(WIDTH)])
    if mode == "RGBA":
        image.putalpha(mask())
    return image.convert(mode)


def mask():
    image = Image.new("L", (WIDTH, HEIGHT))
    image.putdata([alpha(x, y) for y in range(HEIGHT) for x in range(WIDTH)])
    return image


def wanted(name, rgb):
    assert rgb.mode == "RGB"
    header = b"P6 %d %d 255\n" % rgb.size
    (FOLDER / f"{name}.ppm").write_bytes(header + rgb.tobytes())


def on_white(image):
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def save(name, image, **options):
    """Saves a picture, and what Pillow reads from the file."""
    image.save(FOLDER / name, **options)
    read = Image.open(FOLDER / name)
    wanted(name, on_white(ImageOps.exif_transpose(read)))


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(name, depth, color, value, interlaced=False, more=b""):
    """Writes a PNG that Pillow cannot write; `value` gives the bytes of a pixel."""
    passes = PASSES if interlaced else [(0, 0, 1, 1)]
    rows = b""
    for left, top, dx, dy in passes:
        for y in range(top, HEIGHT, dy):
            rows += b"\0" + b"".join(value(x, y) for x in range(left, WIDTH, dx))
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, color, 0, 0, interlaced)
    body = chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (FOLDER / name).write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def deep(*values):
    """Values of 8 bits as 16-bit ones that are rounded to them."""
    return b"".join(struct.pack(">H", 257 * v + (v % 3 - 1) * (0 < v < 255) * 100) for v in values)


def flat(x, y):
    a = alpha(x, y)
    return tuple((c * a + 255 * (255 - a) + 127) // 255 for c in pixel(x, y))


def from_pixels(of):
    image = Image.new("RGB", (WIDTH, HEIGHT))
    image.putdata([of(x, y) for y in range(HEIGHT) for x in range(WIDTH)])
    return image


def main():
    FOLDER.mkdir(exist_ok=True)
    for n in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = n
        save(f"orientation-{n}.jpg", picture(), exif=exif, quality=95, subsampling=0)
    exif = Image.Exif()
    exif[0x0112] = 6
    save("orientation.png", picture(), exif=exif)
    save("orientation.webp", picture(), exif=exif, lossless=True)

    cmyk = picture("CMYK")
    ink = mask().point(lambda a: a // 3)
    cmyk = Image.merge("CMYK", cmyk.split()[:3] + (ink,))
    save("cmyk.jpg", cmyk, quality=95)
    # YCCK: the first three values are YCbCr of the values that an Adobe file stores, which are inverted.
    inverted = Image.merge("RGB", [c.point(lambda v: 255 - v) for c in cmyk.split()[:3]]).convert("YCbCr")
    stored = [c.point(lambda v: 255 - v) for c in inverted.split()]
    Image.merge("CMYK", stored + [ink]).save(FOLDER / "ycck.jpg", quality=95)
    data = bytearray((FOLDER / "ycck.jpg").read_bytes())
    data[data.index(b"Adobe") + 11] = 2
    (FOLDER / "ycck.jpg").write_bytes(data)
    wanted("ycck.jpg", Image.open(FOLDER / "ycck.jpg").convert("RGB"))

    save("rgb.jpg", picture(), quality=95, keep_rgb=True, subsampling=0)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    save("profile.jpg", picture(), quality=95, subsampling=0, icc_profile=profile)
    save("profile.png", picture(), icc_profile=profile)

    png("deep-rgb.png", 16, 2, lambda x, y: deep(*pixel(x, y)))
    wanted("deep-rgb.png", picture())
    png("deep-rgba.png", 16, 6, lambda x, y: deep(*pixel(x, y)) + struct.pack(">H", 257 * alpha(x, y)))
    wanted("deep-rgba.png", from_pixels(flat))
    png("deep-grey.png", 16, 0, lambda x, y: deep(pixel(x, y)[1]))
    wanted("deep-grey.png", from_pixels(lambda x, y: (pixel(x, y)[1],) * 3))
    png("deep-grey-alpha.png", 16, 4, lambda x, y: deep(pixel(x, y)[1]) + struct.pack(">H", 257 * alpha(x, y)))
    wanted("deep-grey-alpha.png", from_pixels(lambda x, y: (flat(x, y)[1],) * 3))
    png("interlaced.png", 8, 2, lambda x, y: bytes(pixel(x, y)), interlaced=True)
    wanted("interlaced.png", picture())
    colour = chunk(b"tRNS", struct.pack(">HHH", *pixel(3, 5)))
    png("transparent-colour.png", 8, 2, lambda x, y: bytes(pixel(x, y)), more=colour)
    wanted("transparent-colour.png", from_pixels(lambda x, y: (255,) * 3 if (x, y) == (3, 5) else pixel(x, y)))

    save("grey-alpha.png", Image.merge("LA", [picture("L"), mask()]))
    save("bilevel.png", picture("1"))
    palette = picture().quantize(16)
    save("palette.png", palette)
    save("palette-alpha.png", palette, transparency=bytes(range(0, 256, 16)))
    save("lossless-alpha.webp", picture("RGBA"), lossless=True, exact=True)
    save("lossy-alpha.webp", picture("RGBA"), quality=90)

    frames = [Image.new("RGB", (WIDTH, HEIGHT), c) for c in ("red", "blue")]
    save("animated.gif", picture(), save_all=True, append_images=frames)
    save("animated.png", picture(), save_all=True, append_images=frames)
    save("animated.webp", picture(), save_all=True, append_images=frames, lossless=True)
    save("transparent.gif", palette, transparency=3)
    save("interlaced.gif", palette, interlace=True)


main()
