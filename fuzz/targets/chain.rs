//! Chains of images whose footers are any bytes: refused, or read as the naive putting together of
//! what the footers say.
#![no_main]

use std::fs::File;
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use image_format::Footer;
use libfuzzer_sys::fuzz_target;
use memory_image::{Chain, Image};
use nix::sys::memfd::{MFdFlags, memfd_create};
use page_reader::PageReader;
use ramsnap_fuzz::Sealed;

/// RAM of more than this is looked at only where the footer is read.
const SMALL: u64 = 1 << 20;

struct OnDisk {
    file: File,
    footer: Option<Footer>,
    bytes: Vec<u8>,
}

fn on_disk(body: &[u8], seed: u8) -> Option<OnDisk> {
    let sealed = Sealed::new(body);
    let start = sealed.data_len();
    let file = File::from(memfd_create("image", MFdFlags::MFD_CLOEXEC).ok()?);
    let mut bytes = Vec::new();
    if start <= SMALL {
        // Each byte says where it is, and in which image.
        bytes = (0..start)
            .map(|at| (at / 512) as u8 ^ seed.wrapping_mul(59) | 1)
            .collect();
        let header = sealed.header().len().min(bytes.len());
        bytes[..header].copy_from_slice(&sealed.header()[..header]);
        // Zeros up to the first page.
        let page = sealed.footer().map_or(0, |footer| footer.data_start()) as usize;
        if page > header {
            bytes[header..page].fill(0);
        }
        file.write_all_at(&bytes, 0).ok()?;
    } else {
        file.write_all_at(sealed.header(), 0).ok()?;
    }
    file.write_all_at(&sealed.tail(), start).ok()?;
    let footer = sealed.footer().ok();
    Some(OnDisk {
        file,
        footer,
        bytes,
    })
}

fn apply(image: &OnDisk, ram: &mut [u8]) {
    let footer = image.footer.as_ref().expect("it was opened");
    for run in &footer.runs {
        let target = &mut ram[run.start as usize..run.range().end as usize];
        match run.stored_at(run.start) {
            Some(at) => target.copy_from_slice(&image.bytes[at as usize..][..target.len()]),
            None => target.fill(0),
        }
    }
}

/// Bodies, each after its length in two bytes.
fn split(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut bodies = Vec::new();
    while let Some((len, rest)) = bytes.split_first_chunk() {
        let (body, rest) = rest.split_at(rest.len().min(u16::from_le_bytes(*len).into()));
        bodies.push(body);
        bytes = rest;
    }
    bodies
}

fuzz_target!(|bytes: &[u8]| {
    let bodies = split(bytes);
    let images: Vec<_> = bodies
        .iter()
        .take(4)
        .zip(1..)
        .filter(|(body, _)| !body.is_empty() && body.len() < 1 << 20)
        .filter_map(|(body, seed)| on_disk(body, seed))
        .collect();
    let paths: Vec<_> = images
        .iter()
        .map(|image| format!("/proc/self/fd/{}", image.file.as_raw_fd()))
        .collect();
    for (path, image) in paths.iter().zip(&images) {
        let opened = Image::open(path);
        assert_eq!(opened.is_ok(), image.footer.is_some());
        if let Ok(opened) = opened
            && opened.ram_size() <= SMALL
        {
            // Its checksums are arbitrary bytes, so it may report damage. It must not fail.
            let _report = opened
                .verify(&mut |_| ControlFlow::Continue(()))
                .expect("a file in memory can be read");
        }
    }
    let Ok(chain) = Chain::open_sealed(&paths) else {
        return;
    };
    let ids: Vec<_> = images
        .iter()
        .filter_map(|image| image.footer.as_ref())
        .collect();
    for pair in ids.windows(2) {
        assert_eq!(pair[1].parent(), Some(pair[0].id));
    }
    if chain.ram_size() > SMALL {
        return;
    }
    let mut expected = vec![0; chain.ram_size() as usize];
    images.iter().for_each(|image| apply(image, &mut expected));
    let mut known = 0;
    for run in chain.covered_runs() {
        let mut read = vec![0xee; (run.end - run.start) as usize];
        known += run.end - run.start;
        chain
            .read_at(run.start, &mut read)
            .expect("files in memory can be read");
        assert!(read == expected[run.start as usize..run.end as usize]);
    }
    let mut read = vec![0xee; expected.len()];
    let all = chain.read_at(0, &mut read);
    // Memory that no diff holds is an error, and not zeros.
    assert_eq!(all.is_ok(), chain.is_full() || known == chain.ram_size());
    if chain.is_full() {
        assert!(read == expected);
        let mut restored = vec![0; expected.len()];
        chain
            .restore_zeroed(restored.as_mut_slice())
            .expect("memory takes it");
        assert!(restored == expected);
    }
});
