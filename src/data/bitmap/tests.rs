//! What is decoded and what is refused.

use super::*;
use crate::data::image::Image;
use crate::data::save_png;
use crate::data::scratch::Scratch;

/// A picture in which every pixel differs from its neighbours.
fn ramp(height: usize, width: usize) -> Image {
    let rgb: Vec<u8> = (0..height * width * 3).map(|i| (i * 37 % 256) as u8).collect();
    Image::from_u8(height, width, &rgb).unwrap()
}

#[test]
fn formats_are_told_by_content() {
    let dir = Scratch::new("formats");
    let rgb = ::image::RgbImage::from_pixel(9, 5, ::image::Rgb([200, 40, 90]));
    let grey = ::image::GrayImage::from_pixel(9, 5, ::image::Luma([77]));
    rgb.save_with_format(dir.path("a.png"), ImageFormat::Jpeg).unwrap();
    rgb.save_with_format(dir.path("b.jpg"), ImageFormat::WebP).unwrap();
    grey.save_with_format(dir.path("c"), ImageFormat::Png).unwrap();
    for (name, want, tolerance) in
        [("a.png", [200, 40, 90], 4), ("b.jpg", [200, 40, 90], 0), ("c", [77, 77, 77], 0)]
    {
        let image = Image::open(dir.path(name)).unwrap();
        assert_eq!((image.height, image.width), (5, 9));
        for pixel in image.to_u8().chunks(3) {
            for (got, want) in pixel.iter().zip(want) {
                assert!((i32::from(*got) - want).abs() <= tolerance, "{name}: {pixel:?}");
            }
        }
    }
}

#[test]
fn alpha_is_flattened_on_white() {
    let dir = Scratch::new("alpha");
    let mut rgba = ::image::RgbaImage::new(3, 1);
    rgba.put_pixel(0, 0, ::image::Rgba([10, 20, 30, 255]));
    rgba.put_pixel(1, 0, ::image::Rgba([10, 20, 30, 0]));
    rgba.put_pixel(2, 0, ::image::Rgba([0, 0, 255, 51]));
    rgba.save(dir.path("a.png")).unwrap();
    let image = Image::open(dir.path("a.png")).unwrap();
    assert_eq!(image.to_u8(), [10, 20, 30, 255, 255, 255, 204, 204, 255]);
}

#[test]
fn sixteen_bits_are_rounded_to_eight() {
    let dir = Scratch::new("sixteen");
    let deep = ::image::ImageBuffer::from_pixel(2, 2, ::image::Rgb([0u16, 65535, 257 * 99]));
    deep.save(dir.path("a.png")).unwrap();
    assert_eq!(Image::open(dir.path("a.png")).unwrap().to_u8()[..3], [0, 255, 99]);
}

#[test]
fn what_is_no_picture_is_refused() {
    let dir = Scratch::new("corrupt");
    let text = |name: &str| Image::open(dir.path(name)).unwrap_err().to_string();
    assert!(text("missing.png").contains("missing.png: "));
    dir.write("text.png", b"hello");
    assert!(text("text.png").contains("not a PNG, JPEG, WebP or GIF picture"));
    dir.write("empty.png", b"");
    assert!(text("empty.png").contains("not a PNG, JPEG, WebP or GIF picture"));
    save_png(dir.path("whole.png"), &ramp(40, 40)).unwrap();
    let whole = std::fs::read(dir.path("whole.png")).unwrap();
    dir.write("half.png", &whole[..whole.len() / 2]);
    assert!(text("half.png").contains("cannot be decoded"), "{}", text("half.png"));
    ::image::RgbImage::new(MAX_SIDE + 1, 1).save(dir.path("wide.png")).unwrap();
    assert!(text("wide.png").contains("too large"), "{}", text("wide.png"));
    // A header that declares 16384 x 16384 pixels is refused before anything is allocated.
    let mut bomb = whole[..33].to_vec();
    bomb[16..24].copy_from_slice(&[0, 0, 0x40, 0, 0, 0, 0x40, 0]);
    let crc = crc32(&bomb[12..29]);
    bomb[29..33].copy_from_slice(&crc.to_be_bytes());
    bomb.extend_from_slice(&whole[33..]);
    dir.write("bomb.png", &bomb);
    assert!(text("bomb.png").contains("too large"), "{}", text("bomb.png"));
}

#[test]
fn cut_and_holed_files_of_every_format_are_refused() {
    let dir = Scratch::new("cut");
    save_png(dir.path("a.png"), &ramp(61, 83)).unwrap();
    let rgb = ramp(61, 83).to_u8();
    ::image::save_buffer(dir.path("a.webp"), &rgb, 83, 61, ::image::ExtendedColorType::Rgb8).unwrap();
    let files = [
        ("baseline.jpg", include_bytes!("../../../tests/pictures/baseline.jpg").to_vec(), true),
        ("progressive.jpg", include_bytes!("../../../tests/pictures/progressive.jpg").to_vec(), true),
        ("restart.jpg", include_bytes!("../../../tests/pictures/restart.jpg").to_vec(), true),
        ("cmyk.jpg", include_bytes!("../../../tests/pictures/cmyk.jpg").to_vec(), true),
        ("a.png", std::fs::read(dir.path("a.png")).unwrap(), true),
        // Neither lossless nor lossy WebP has a checksum.
        ("a.webp", std::fs::read(dir.path("a.webp")).unwrap(), false),
        ("lossy.webp", include_bytes!("../../../tests/pictures/lossy.webp").to_vec(), false),
    ];
    for (name, whole, checked) in files {
        dir.write(name, &whole);
        let image = Image::open(dir.path(name)).unwrap();
        assert_eq!((image.height, image.width), (61, 83), "{name}");
        dir.write(name, &[&whole[..], &[0; 100]].concat());
        assert_eq!(Image::open(dir.path(name)).unwrap(), image, "{name} with bytes after it");
        for percent in [60, 50, 30, 95] {
            dir.write(name, &whole[..whole.len() * percent / 100]);
            let e = Image::open(dir.path(name)).expect_err(name).to_string();
            assert!(e.contains("cannot be decoded ("), "{name} cut to {percent}%: {e}");
        }
        if checked {
            let mut holed = whole.clone();
            holed[whole.len() * 6 / 10..whole.len() * 8 / 10].fill(0);
            dir.write(name, &holed);
            let e = Image::open(dir.path(name)).expect_err(name).to_string();
            assert!(e.contains("cannot be decoded ("), "{name} with a hole: {e}");
        }
    }
}

#[test]
fn other_formats_folders_and_empty_files_are_named() {
    let dir = Scratch::new("others");
    dir.write("a.jpg", b"BM...............");
    dir.write("b.jpg", b"II*\0............");
    dir.write("c.jpg", b"");
    dir.write("d.jpg/inside", b"");
    for (name, want) in [
        ("a.jpg", "this is a BMP picture, not a PNG, JPEG, WebP or GIF picture; convert it"),
        ("b.jpg", "this is a TIFF picture, not"),
        ("c.jpg", "this file is empty, not"),
        ("d.jpg", "this is a folder, not a picture"),
    ] {
        let e = Image::open(dir.path(name)).unwrap_err().to_string();
        assert!(e.contains(&format!("{name}: {want}")), "{e}");
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &b| {
        (0..8).fold(crc ^ u32::from(b), |c, _| if c & 1 == 1 { c >> 1 ^ 0xEDB8_8320 } else { c >> 1 })
    })
}
