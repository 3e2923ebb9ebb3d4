//! Images that are written to or resized in place after a chain was opened.

mod support;

use std::error::Error;
use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use memory_image::{Chain, Image, MappedChain, ReadImageError, VerifyError};
use memory_writer::{Layout, MemoryWriter, PackedStream, SnapshotError};
use page_reader::{Layered, Touched};
use rstest::rstest;
use support::raw_guest::{Guest, PAGE, SIZE};

/// Simulates the next tick of the file system's clock.
fn tick(file: &File) {
    let later = SystemTime::now() + Duration::from_secs(1);
    file.set_modified(later).unwrap();
}

fn write_to(path: &Path) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&[0x5a; PAGE as usize], 0).unwrap();
    tick(&file);
}

fn truncate_and_grow(path: &Path) {
    let file = File::options().write(true).open(path).unwrap();
    let len = file.metadata().unwrap().len();
    file.set_len(0).unwrap();
    file.set_len(len).unwrap();
    tick(&file);
}

type Operation = fn(&Guest, &Chain) -> Result<(), Box<dyn Error>>;

fn restore(_: &Guest, chain: &Chain) -> Result<(), Box<dyn Error>> {
    Ok(chain.restore(vec![0; SIZE as usize].as_mut_slice())?)
}

fn restore_zeroed(_: &Guest, chain: &Chain) -> Result<(), Box<dyn Error>> {
    Ok(chain.restore_zeroed(vec![0; SIZE as usize].as_mut_slice())?)
}

fn restore_a_run(_: &Guest, chain: &Chain) -> Result<(), Box<dyn Error>> {
    let runs = || std::iter::once(0..PAGE);
    let go_on = &mut |_| ControlFlow::Continue(());
    Ok(chain.restore_runs(vec![0; SIZE as usize].as_mut_slice(), runs, go_on)?)
}

fn map(_: &Guest, chain: &Chain) -> Result<(), Box<dyn Error>> {
    let _ = MappedChain::open(chain)?;
    Ok(())
}

fn copy_by_mapping(_: &Guest, chain: &Chain) -> Result<(), Box<dyn Error>> {
    let _ = MappedChain::options().max_mappings(1).map(chain)?;
    Ok(())
}

fn compare_older(guest: &Guest, chain: &Chain) -> Result<(), Box<dyn Error>> {
    let go_on = &mut |_| ControlFlow::Continue(());
    let _ = memory_image::compare(chain, &guest.ram, SIZE, PAGE, go_on)?;
    Ok(())
}

fn compare_newer(guest: &Guest, chain: &Chain) -> Result<(), Box<dyn Error>> {
    let go_on = &mut |_| ControlFlow::Continue(());
    // Readers of readers pass the check on.
    let touched = Touched::new(chain, SIZE);
    let layered = Layered::over(&touched, SIZE)?;
    let _ = memory_image::compare(&guest.ram, &layered, SIZE, PAGE, go_on)?;
    Ok(())
}

fn write(guest: &Guest, chain: &Chain) -> Result<(), Box<dyn Error>> {
    let mut writer = MemoryWriter::open(guest.path("written"), SIZE, PAGE)?;
    chain.write_to(&mut writer)?;
    Ok(())
}

#[rstest]
#[case::restore(restore)]
#[case::restore_zeroed(restore_zeroed)]
#[case::restore_a_run(restore_a_run)]
#[case::map(map)]
#[case::copy_by_mapping(copy_by_mapping)]
#[case::compare_older(compare_older)]
#[case::compare_newer(compare_newer)]
#[case::write(write)]
fn an_image_changed_after_it_was_opened_is_an_error(
    #[case] operation: Operation,
    #[values(write_to, truncate_and_grow)] change: fn(&Path),
    #[values(0, 1)] changed: usize,
) {
    let guest = Guest::with_history();
    let chain = guest.chain();
    operation(&guest, &chain).expect("the images are unchanged");
    change(&guest.snapshots[changed]);
    let error = operation(&guest, &chain).expect_err("an image was changed");
    let mut cause: Option<&(dyn Error + 'static)> = Some(&*error);
    let mut found = false;
    while let Some(error) = cause {
        found |= error.to_string().contains("was written to");
        cause = error.source();
    }
    assert!(found, "{error:?}");
    assert!(matches!(
        chain.check_unchanged(),
        Err(ReadImageError::Changed { path }) if path == guest.snapshots[changed]
    ));
}

/// The bytes of the chunks that were read before a change match their checksums.
#[rstest]
fn an_image_changed_while_it_is_verified_is_an_error(
    #[values(Layout::Sealed, Layout::Packed)] layout: Layout,
    #[values(write_to, truncate_and_grow)] change: fn(&Path),
    #[values(false, true)] before: bool,
) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let options = MemoryWriter::options().layout(layout);
    let mut writer = options.open(&path, SIZE, PAGE).unwrap();
    writer.write_full(&vec![1; SIZE as usize]).unwrap();
    writer.commit().unwrap();
    let image = Image::open(&path).unwrap();
    let mut go_on = |_| ControlFlow::Continue(());
    assert!(image.verify(&mut go_on).unwrap().is_ok());
    let total = image.footer().unwrap().present_bytes();
    let found = image.verify(&mut |progress| {
        if progress.done == if before { 0 } else { total } {
            change(&path);
        }
        ControlFlow::Continue(())
    });
    assert!(
        matches!(
            &found,
            Err(VerifyError::Read(ReadImageError::Changed { path: changed })) if *changed == path
        ),
        "{found:?}"
    );
}

#[test]
fn chain_that_changed_is_not_committed_by_a_writer() {
    let guest = Guest::with_history();
    let chain = guest.chain();
    write_to(chain.paths().next().unwrap());
    let dest = tempfile::tempdir().unwrap();
    let dest = dest.path().join("copy");
    let mut writer = MemoryWriter::open(&dest, SIZE, PAGE).unwrap();
    let error = writer.write_full(&chain).unwrap_err();
    assert!(matches!(error, SnapshotError::Source { .. }));
    assert!(error.to_string().contains("changed"), "{error}");
    assert!(writer.commit().is_err());
    assert!(!dest.exists());

    let mut stream = PackedStream::new(Vec::new(), SIZE, PAGE).unwrap();
    let error = stream.write_full(&chain).unwrap_err();
    assert!(matches!(error, SnapshotError::Source { .. }));
    assert!(stream.finish().is_err());
}
