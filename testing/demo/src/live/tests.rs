//! The images of a live demo are the guest at the point in time, and a damaged one is detected.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use guests::ledger::{ENTRY, Layout};
use memory_image::Image;
use rstest::rstest;
use test_machine::needs;

use super::*;

const SIZE: u64 = 16 << 20;

fn demo(tamper: impl FnOnce(&mut [Capture])) -> Story {
    let dir = tempfile::tempdir().unwrap();
    let plan = Plan {
        ram: SIZE,
        calm: Duration::from_millis(50),
        dir: dir.path(),
    };
    let tamper = |captures: &mut [Capture]| {
        tamper(captures);
        Ok(())
    };
    plan.carry_out(&Progress::hidden(), tamper).unwrap()
}

/// Returns the page of an image at an offset in the RAM, and its place in the file.
fn page(image: &Path, offset: u64) -> (File, u64, Vec<u8>) {
    let start = Image::open(image).unwrap().footer().unwrap().data_start() + offset;
    let file = File::options().read(true).write(true).open(image).unwrap();
    let mut page = vec![0; PAGE as usize];
    file.read_exact_at(&mut page, start).unwrap();
    (file, start, page)
}

#[test]
fn restored_guests_are_the_original_at_its_pauses() {
    needs!(Kvm, Userfaultfd);
    let story = demo(|_| ());
    assert_eq!(story.mismatches, [""; 0]);
    let methods = story.captures.iter().map(|it| it.report.method);
    assert_eq!(methods.collect::<Vec<_>>(), METHODS);
    for capture in &story.captures {
        assert!(capture.copy.is_some() && capture.pause >= capture.report.freeze);
    }
    assert!(story.steps >= 1000);
    let (out, text) = (tempfile::tempdir().unwrap(), chart::text(&story.captures));
    let story = Box::new(story);
    story.show(out.path()).unwrap();
    let svg = fs::read_to_string(out.path().join("live.svg")).unwrap();
    for method in METHODS {
        let name = method.to_string();
        assert!(text.contains(&name) && svg.contains(&name), "{name}");
    }
    assert!(text.matches('X').count() > METHODS.len(), "{text}");
    story.close().unwrap();
}

#[rstest]
#[case::a_flipped_byte(
    |captures: &mut [Capture]| {
        let (file, at, page) = page(&captures[0].image, Layout::LEDGER);
        file.write_all_at(&[page[ENTRY as usize] ^ 1], at + ENTRY).unwrap();
    },
    &["copy-on-write: 1 pages of the restored RAM differ", "stale or torn pages", "digest"]
)]
#[case::a_page_written_after_the_pause(
    |captures: &mut [Capture]| {
        let layout = smp::layout(SIZE);
        let pages = (0..layout.pages).map(|number| {
            let of = |capture: &Capture| page(&capture.image, layout.page(number));
            (of(&captures[1]), of(&captures[2]))
        });
        let mut written = pages.filter(|(before, after)| before.2 != after.2);
        let ((file, at, _), (_, _, later)) = written.next().unwrap();
        file.write_all_at(&later, at).unwrap();
    },
    &["pre-copy: 1 pages of the restored RAM differ", "stale or torn pages"]
)]
#[case::the_image_of_a_later_pause(
    |captures: &mut [Capture]| captures[0].image = captures[1].image.clone(),
    &["copy-on-write: ", "of the restored RAM differ", "were paused at"]
)]
fn verification_fails_for(#[case] tamper: fn(&mut [Capture]), #[case] expected: &[&str]) {
    needs!(Kvm, Userfaultfd);
    let story = demo(tamper);
    let said = story.mismatches.join("; ");
    for part in expected {
        assert!(said.contains(part), "{part:?} is not in {said:?}");
    }
    let closing = Box::new(story).close().unwrap_err().to_string();
    assert!(closing.starts_with("not verified: "), "{closing}");
}

#[rstest]
#[case::much("MemTotal: 9 kB\nMemAvailable:   33554432 kB\n", Some(4 << 30))]
#[case::less("MemAvailable: 8388608 kB\n", Some(2 << 30))]
#[case::little("MemAvailable: 1024 kB\n", Some(64 << 20))]
#[case::unknown("MemFree: 1024 kB\n", None)]
fn default_ram_fits_into_the_memory(#[case] meminfo: &str, #[case] ram: Option<u64>) {
    assert_eq!(available(meminfo).map(fitting), ram);
}
