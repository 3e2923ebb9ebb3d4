//! The image is the RAM at the point in time, whatever the guest writes before and after.

#![cfg(all(target_os = "linux", not(ramsnap_loom)))]

#[path = "support/guest.rs"]
mod guest;

use guest::{Guest, Images, assert_same};
use live_snapshot::{LiveSnapshot, Method};
use memory_writer::Layout;
use rstest::rstest;
use test_machine::needs;

const SIZE: u64 = 24 << 20;

#[rstest]
fn image_is_the_ram_at_the_point_in_time(
    #[values(Layout::Raw, Layout::Sealed, Layout::Packed)] layout: Layout,
    #[values(Method::StopAndCopy, Method::PreCopy, Method::CopyOnWrite)] method: Method,
) {
    needs!(Userfaultfd);
    let mut guest = Guest::idle(SIZE);
    guest.fill();
    let mut images = Images::new(layout, SIZE);
    guest.run_vcpu(1, SIZE / 2);
    guest.run_vcpu(2, SIZE / 4);
    for round in 0..6 {
        let diff = round % 3 != 0;
        let options = LiveSnapshot::options()
            .method(method)
            .diff(diff)
            .remainder(1 << 20);
        let live = options.begin(&guest.tracker, images.next(diff)).unwrap();
        let (frozen, ram) = guest.pause(|| {
            let ram = guest.contents();
            (live.freeze().unwrap(), ram)
        });
        guest.wait_for_writes(1000);
        let report = frozen.commit().unwrap();
        assert_eq!(report.method, method);
        assert_same(&images.contents(), &ram);
    }
}
