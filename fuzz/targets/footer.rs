//! Footers of any bytes, with and without a checksum that is right: refused, or consistent and the
//! same when written again.
#![no_main]

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use image_format::{CHUNK_SIZE, Footer, Layout, RAW_UNIT, Storage};
use libfuzzer_sys::fuzz_target;
use nix::sys::memfd::{MFdFlags, memfd_create};
use ramsnap_fuzz::Sealed;

fuzz_target!(|bytes: &[u8]| {
    // As a whole file.
    let layouts = Layout::ALL.into_iter().filter(|layout| layout.has_footer());
    for format in layouts.map(Some).chain([None]) {
        let read = Footer::read_from(bytes.len() as u64, format, |buf, offset| {
            let from = bytes
                .get(offset as usize..)
                .and_then(|from| from.get(..buf.len()));
            buf.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        });
        if let Ok(footer) = read {
            // Nothing that may be raw RAM, unless it was named.
            assert!(format.is_some() || bytes.len() as u64 % RAW_UNIT != 0);
            assert!(format.is_none_or(|format| format == footer.layout));
        }
    }
    if bytes.is_empty() || bytes.len() as u64 > CHUNK_SIZE {
        return;
    }
    let sealed = Sealed::new(bytes);
    let Ok(footer) = sealed.footer() else {
        return;
    };
    footer.check().expect("what was read is consistent");
    let present: u64 = footer
        .chunks()
        .take(10_000)
        .flat_map(|chunk| {
            let pieces: Vec<_> = chunk.pieces().collect();
            assert!(!pieces.is_empty());
            assert!(
                pieces
                    .iter()
                    .all(|(range, _)| chunk.range.start <= range.start
                        && range.end <= chunk.range.end)
            );
            pieces
        })
        .map(|(range, at)| {
            assert!(
                at.checked_add(range.end - range.start)
                    .is_some_and(|end| end <= footer.data_end())
            );
            range.end - range.start
        })
        .sum();
    assert!(present <= footer.present_bytes());
    for run in &footer.runs {
        assert_eq!(footer.run_at(run.start), Some(run));
        assert_eq!(footer.run_at(run.range().end - 1), Some(run));
        assert_eq!(
            run.stored == Storage::Zeros,
            run.stored_at(run.start).is_none()
        );
    }
    // Within what a memory file may be.
    if footer.data_end() < 1 << 40 {
        let file = File::from(memfd_create("footer", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
        let len = footer.write(&file).expect("what was read can be written");
        assert_eq!(len, sealed.file_len());
        let mut again = vec![0; sealed.tail().len()];
        file.read_exact_at(&mut again, sealed.data_len())
            .expect("it was written");
        assert!(again == sealed.tail());
        let mut header = vec![0; sealed.header().len()];
        file.read_exact_at(&mut header, 0).expect("it was written");
        assert!(header == sealed.header());
    }
});
