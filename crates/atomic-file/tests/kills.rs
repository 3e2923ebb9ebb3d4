//! Kills: `strace` kills a writer at each of its system calls.

mod support;

use std::path::Path;

use atomic_file::{AtomicWriter, sweep};
use rstest::rstest;
use support::commit;
use support::faults::{
    MAX, assert_only_dest, kill, no_file, old_file_and_spare, one_old_file, tamper, text,
};
use test_machine::needs;

/// Runs the job of `support::command`; not a test by itself.
#[test]
fn child() {
    let Some((job, dir)) = support::job() else {
        return;
    };
    let dest = dir.join("dest");
    let elsewhere = || AtomicWriter::options().staging_dir(dir.join("staging"));
    support::traced(&dir, || match job.as_str() {
        "replace" => support::replace(&AtomicWriter::options().mode(0o640), &dest),
        "no clobber" => support::replace(&AtomicWriter::options().no_clobber(true), &dest),
        "elsewhere" => support::replace(&elsewhere(), &dest),
        "recycle" => support::replace(&AtomicWriter::options().recycle(MAX), &dest),
        other => panic!("no such job: {other}"),
    });
}

#[rstest]
#[case::replace("replace", one_old_file as fn(&Path))]
#[case::no_clobber("no clobber", no_file)]
#[case::elsewhere("elsewhere", one_old_file)]
#[case::recycle("recycle", old_file_and_spare)]
fn killed_at_any_call_the_file_is_complete_and_sweep_cleans_up(
    #[case] job: &str,
    #[case] prepare: fn(&Path),
) {
    needs!(Strace);
    let seen = std::cell::RefCell::new(std::collections::BTreeSet::new());
    tamper(job, prepare, kill, |dir, report, context| {
        assert_eq!(report, None, "the job was not killed: {context}");
        let now = text(dir);
        assert!(now == "old" || now == "new", "{now}: {context}");
        seen.borrow_mut().insert(now);
        sweep(dir).unwrap();
        sweep(dir.join("staging")).unwrap();
        assert_only_dest(dir, context);
        commit(&AtomicWriter::options(), &dir.join("dest"), b"next").unwrap();
    });
    assert_eq!(seen.into_inner().len(), 2, "both outcomes were seen");
}

/// The file of the preflight, which has a second name briefly, is removed too.
#[test]
fn open_succeeds_after_a_no_clobber_writer_was_killed() {
    needs!(Strace);
    tamper("no clobber", no_file, kill, |dir, report, context| {
        assert_eq!(report, None, "the job was not killed: {context}");
        let dest = dir.join("dest");
        if !dest.exists() {
            let options = AtomicWriter::options().no_clobber(true);
            commit(&options, &dest, b"new").unwrap();
        }
        assert_only_dest(dir, context);
        assert_eq!(text(dir), "new", "{context}");
    });
}

#[test]
fn open_succeeds_after_a_recycling_writer_was_killed() {
    needs!(Strace);
    tamper(
        "recycle",
        old_file_and_spare,
        kill,
        |dir, report, context| {
            assert_eq!(report, None, "the job was not killed: {context}");
            for text in ["next", "one more", "last"] {
                let writer = AtomicWriter::options().recycle(MAX).open(dir.join("dest"));
                let writer = writer.unwrap();
                writer.file().set_len(text.len() as u64).unwrap();
                writer.write_all_at(text.as_bytes(), 0).unwrap();
                writer.commit().unwrap();
                assert_eq!(self::text(dir), text, "{context}");
                assert_only_dest(dir, context);
            }
        },
    );
}
