//! Several writers that recycle at once.

mod support;

use std::fs;
use std::path::Path;

use atomic_file::{AtomicWriter, sweep};
use support::recycling::{SIZE, one_at_a_time, recycled_files, recycling, with_recycled_file};
use support::{assert_names, names};
use test_machine::rounds;

/// Runs the job of `support::command`; not a test by itself.
#[test]
fn child() {
    let Some((job, dir)) = support::job() else {
        return;
    };
    assert_eq!(job, "race");
    for _ in 0..50 {
        save_any(&dir.join("dest"), std::process::id() as u8 | 8);
    }
    println!("\nREPORT raced");
}

#[test]
fn of_two_writers_one_reuses_the_file() {
    let _turn = one_at_a_time();
    let (dir, dest, _) = with_recycled_file();
    let first = recycling().open(&dest).unwrap();
    let second = recycling().open(&dest).unwrap();
    assert!(first.recycled() && !second.recycled());
    for (writer, byte) in [(first, 3), (second, 4)] {
        writer.write_all_at(&[byte; SIZE], 0).unwrap();
        writer.commit().unwrap();
        assert_eq!(fs::read(&dest).unwrap(), [byte; SIZE]);
        assert_eq!(recycled_files(dir.path()).len(), 1);
    }
    assert_eq!(names(dir.path()).len(), 2);
    assert_eq!(
        fs::read(&recycled_files(dir.path())[0]).unwrap(),
        [2; SIZE],
        "the first"
    );
}

fn save_any(dest: &Path, byte: u8) {
    let options = match byte % 3 {
        0 => AtomicWriter::options(),
        _ => recycling(),
    };
    let writer = options.open(dest).unwrap();
    writer.file().set_len(SIZE as u64).unwrap();
    writer.write_all_at(&[byte; SIZE], 0).unwrap();
    writer.commit().unwrap();
}

#[test]
fn racing_recycling_writers_never_show_a_torn_file() {
    let _turn = one_at_a_time();
    let (dir, dest, _) = with_recycled_file();
    let done = std::sync::atomic::AtomicBool::new(false);
    let is_done = || done.load(std::sync::atomic::Ordering::Relaxed);
    let begun = std::sync::Barrier::new(2);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut seen = std::collections::BTreeSet::new();
            let mut look = || {
                let bytes = fs::read(&dest).unwrap();
                assert_eq!(bytes, [bytes[0]; SIZE], "torn");
                seen.insert(bytes[0]);
            };
            look();
            begun.wait();
            while !is_done() {
                look();
            }
            look();
            seen.len()
        });
        let sweeper = scope.spawn(|| {
            while !is_done() {
                sweep(dir.path()).unwrap();
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        });
        begun.wait();
        // The file already holds 2s.
        let writers: Vec<_> = (3..6)
            .map(|id| {
                scope.spawn({
                    let dest = &dest;
                    move || (0..rounds(20, 100)).for_each(|_| save_any(dest, id))
                })
            })
            .collect();
        let child = support::report(support::command("race", dir.path()));
        let ended: Vec<_> = writers.into_iter().map(|writer| writer.join()).collect();
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(ended.iter().all(Result::is_ok), "a writer failed");
        assert_eq!(child.as_deref(), Some("raced"));
        sweeper.join().unwrap();
        assert!(reader.join().unwrap() > 1);
    });
    let report = sweep(dir.path()).unwrap();
    assert!(
        report.removed.is_empty() && report.recycled.len() <= 1,
        "{report:?}"
    );
    assert_names(dir.path(), &["dest"]);
}
