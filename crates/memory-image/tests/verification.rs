//! Verification of sealed and packed images.

mod support;

use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use memory_image::{CancelToken, Damage, Image, MergeError, Pass, VerifyError};
use memory_writer::{Layout, MemoryWriter, Seal};
use support::sealed_guest::{Guest, PAGE, options, verify};

#[test]
fn flipped_bits_are_detected_throughout_a_large_image() {
    let layouts = Layout::ALL.into_iter().filter(|layout| layout.has_footer());
    let guests: Vec<_> = layouts.map(Guest::with_history).collect();
    for path in guests.iter().flat_map(|guest| &guest.snapshots[..2]) {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let len = file.metadata().unwrap().len();
        let pages = Image::open(path).unwrap().footer().unwrap().data_start();
        for at in (pages..len).step_by(50_929) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            let flipped = [byte[0] ^ 1 << (at % 8)];
            file.write_all_at(&flipped, at).unwrap();
            let detected = verify(path).is_ok_and(|found| !found.is_ok());
            assert!(detected, "byte {at} of {len} in {path:?}");
            file.write_all_at(&byte, at).unwrap();
        }
        assert!(verify(path).unwrap().is_ok());
    }
}

#[test]
fn damage_is_named_by_chunk_and_offset() {
    let guest = Guest::with_history(Layout::Packed);
    let path = &guest.snapshots[0];
    let footer = Image::open(path).unwrap().footer().cloned().unwrap();
    let run = footer.run_at(300 * PAGE).unwrap();
    let at = run.stored_at(300 * PAGE).unwrap();
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&[0xff; 3], at).unwrap();
    let found = verify(path).unwrap();
    assert_eq!(found.damage_count, 1);
    let [
        Damage::Chunk {
            number: 1,
            guest: range,
            ..
        },
    ] = &found.damage[..]
    else {
        panic!("{found:?}");
    };
    assert_eq!(*range, 1 << 20..2 << 20);
    assert_eq!(Some(found.damage[0].offset()), run.stored_at(1 << 20));

    let sealed = Guest::with_history(Layout::Sealed);
    let path = &sealed.snapshots[1];
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&[1], 100 * PAGE + 77).unwrap();
    let found = verify(path).unwrap();
    assert_eq!(
        found.damage,
        [Damage::NotZero {
            offset: 100 * PAGE + 77
        }]
    );
    assert_eq!(found.damage[0].offset(), 100 * PAGE + 77);
}

#[test]
fn verification_reports_progress_and_can_be_cancelled() {
    let guest = Guest::with_history(Layout::Sealed);
    let image = Image::open(&guest.snapshots[0]).unwrap();
    let mut seen = Vec::new();
    let report = image
        .verify(&mut |progress| {
            seen.push(progress);
            ControlFlow::Continue(())
        })
        .unwrap();
    assert!(report.is_ok());
    let (first, last) = (seen[0], seen.last().unwrap());
    assert_eq!((first.done, last.done), (0, first.total));
    let error = image.verify(&mut |_| ControlFlow::Break(())).unwrap_err();
    assert!(matches!(error, VerifyError::Cancelled));
}

/// Each page that is nonzero and in no run is one damage.
#[test]
fn merge_reports_its_verification_and_can_be_cancelled_in_it() {
    let guest = Guest::with_history(Layout::Sealed);
    let merged = guest.path("merged.mem");
    let cancelled = |token: CancelToken, stops: bool| {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let passes = Arc::clone(&seen);
        let options = options(Layout::Packed, Seal::new()).cancel(token);
        let options = options.progress(move |progress| {
            passes.lock().unwrap().push(progress.pass);
            match stops && progress.done > 0 {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        });
        let result = guest.chain().merge(options, &merged);
        let passes = seen.lock().unwrap().clone();
        (result, passes)
    };
    let token = CancelToken::new();
    token.cancel();
    for (token, stops) in [(CancelToken::new(), true), (token, false)] {
        let (result, passes) = cancelled(token, stops);
        let error = result.unwrap_err();
        let in_verification = matches!(error, MergeError::Verify(VerifyError::Cancelled));
        assert!(in_verification, "{error:?}");
        assert!(!passes.is_empty() && passes.iter().all(|pass| *pass == Pass::Verify));
        assert!(!merged.exists());
    }
    let (result, mut passes) = cancelled(CancelToken::new(), false);
    result.unwrap();
    passes.dedup();
    assert_eq!(passes, [Pass::Verify, Pass::Full]);
}

#[test]
fn a_thousand_damages_are_listed_and_all_are_counted() {
    const DAMAGES: u64 = 1010;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("full");
    let size = 2 * DAMAGES * PAGE;
    let sealed = options(Layout::Sealed, Seal::new()).skip_zeros(true);
    let mut writer = sealed.open(&path, size, PAGE).unwrap();
    let mut ram = vec![0; size as usize];
    ram[0] = 1;
    writer.write_full(&ram).unwrap();
    writer.commit().unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    for damage in 0..DAMAGES {
        file.write_all_at(&[1], (2 * damage + 1) * PAGE).unwrap();
    }

    let mut seen = Vec::new();
    let image = Image::open(&path).unwrap();
    let found = image
        .verify(&mut |progress| {
            seen.push(progress);
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!((found.damage_count, found.damage.len()), (DAMAGES, 1000));
    let complete = seen.iter().filter(|seen| seen.done == seen.total);
    assert_eq!(complete.count(), 1, "only the last one");
    let last = seen.last().unwrap();
    assert_eq!(last.done, last.total);
    assert!(last.total >= PAGE + DAMAGES * PAGE, "{last:?}");
}

#[test]
fn merging_a_damaged_image_is_refused() {
    for layout in [Layout::Sealed, Layout::Packed] {
        let guest = Guest::with_history(layout);
        let path = &guest.snapshots[0];
        let at = Image::open(path).unwrap().footer().unwrap().runs[0].stored_at(0);
        let file = File::options().read(true).write(true).open(path).unwrap();
        let at = at.expect("the first page is present");
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        let chain = guest.chain();
        let dest = guest.path("merged");
        let whole = MemoryWriter::options().layout(Layout::Packed);
        let merged = chain.merge(whole.seal(chain.seal()), &dest);
        for result in [merged, chain.flatten(&dest)] {
            let Err(MergeError::Verify(VerifyError::Damaged {
                path: named,
                report,
            })) = result
            else {
                panic!("{result:?}");
            };
            assert_eq!((&named, report.damage_count), (path, 1));
            assert!(!dest.exists());
        }
        file.write_all_at(&byte, at).unwrap();
        let chain = guest.chain();
        chain.verify(&mut |_| ControlFlow::Continue(())).unwrap();
        chain.flatten(&dest).unwrap();
    }
}
