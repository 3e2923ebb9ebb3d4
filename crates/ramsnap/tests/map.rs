//! The map: as text, JSON, SVG and PNG.

mod support;

use std::fs::{self, File};
use std::io::BufReader;

use support::{PAGE, RAM, Work};

#[test]
fn one_image_fills_lines_and_distinguishes_present_from_zero() {
    let work = Work::with_ram();
    work.good("dump ram -o full.mem");
    let map = work.good("map full.mem --width 80").out;
    let lines: Vec<_> = map.lines().collect();
    // 2048 pages: 16 lines of 64 cells, two pages a cell.
    assert_eq!(lines.len(), 16 + 2, "{map}");
    assert!(lines.iter().all(|line| line.chars().count() <= 80), "{map}");
    // The first 64 pages are there, and nothing else of the first line's 128.
    let cells = |line: &str| line.split('│').nth(1).unwrap().to_owned();
    assert_eq!(cells(lines[0]), "█".repeat(32) + &"·".repeat(32));
    assert_eq!(cells(lines[1]), "·".repeat(64));
    // Pages 700 to 702: the second of them fills half a cell.
    let expected = "·".repeat(30) + "█▆" + &"·".repeat(32);
    assert_eq!(cells(lines[5]), expected, "{map}");
    assert!(lines[17].contains("present") && lines[17].contains("clean"));
    assert!(
        !map.contains('\x1b'),
        "no colors where there is no terminal"
    );
}

#[test]
fn a_chain_has_a_line_an_image_and_a_single_page_shows() {
    let work = Work::with_chain();
    let map = work.good("map full.mem d1.mem d2.mem --width 80").out;
    let lines: Vec<_> = map.lines().collect();
    assert!(lines[0].starts_with("full.mem │█"), "{map}");
    assert!(lines[2].starts_with("  d2.mem │"), "{map}");
    let seen = lines[2].split('│').nth(1).unwrap();
    assert_eq!(seen.chars().filter(|cell| *cell != ' ').count(), 2, "{map}");
}

#[test]
fn colors_are_printed_on_request() {
    let work = Work::with_ram();
    let mut command = work.command("map raw:ram --width 80");
    let map = support::Ended::of(command.env("CLICOLOR_FORCE", "1"))
        .good()
        .out;
    assert!(map.contains("\x1b[38;5;196m█"), "{map:?}");
}

#[test]
fn json_lists_the_runs() {
    let work = Work::with_chain();
    let maps = work.good("map full.mem d2.mem raw:ram --json").json();
    assert_eq!(maps[0]["runs"][0]["state"], "present");
    assert_eq!(maps[0]["runs"][0]["bytes"], 64 * PAGE);
    assert_eq!(maps[0]["runs"][1]["state"], "zero");
    assert_eq!(maps[1]["runs"][1]["offset"], 1500 * PAGE);
    assert_eq!(maps[1]["runs"][2], serde_json::Value::Null);
    assert_eq!(maps[2]["ram_bytes"], RAM);
}

#[test]
fn an_svg_is_well_formed_and_labels_every_image() {
    let work = Work::with_chain();
    work.good("map full.mem d1.mem d2.mem -o chain.svg");
    let mut content = String::new();
    let parsed = svg::open(work.path("chain.svg"), &mut content).unwrap();
    let errors = parsed.filter(|event| matches!(event, svg::parser::Event::Error(_)));
    assert_eq!(errors.count(), 0);
    for label in ["full.mem", "d1.mem", "d2.mem", "clean", "100.0 % present"] {
        assert!(content.contains(label), "{label}");
    }
}

#[test]
fn a_png_has_the_colors_of_the_page_states() {
    let work = Work::with_ram();
    work.good("dump ram -o full.mem");
    work.good("map full.mem -o map.png");
    let file = BufReader::new(File::open(work.path("map.png")).unwrap());
    let mut reader = png::Decoder::new(file).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    // 2048 pages, one a cell of 4 by 14 pixels, in 8 lines of 256.
    assert_eq!((info.width, info.height), (1024, 8 * 14));
    let pixel = |cell: usize| {
        let (x, y) = (cell % 256 * 4 + 1, cell / 256 * 14 + 5);
        let at = y * info.line_size + x * 3;
        [pixels[at], pixels[at + 1], pixels[at + 2]]
    };
    let present = [pixel(0), pixel(63), pixel(701), pixel(2047)];
    let zero = [pixel(64), pixel(699), pixel(703), pixel(1999)];
    assert!(
        present.iter().all(|color| *color == present[0]),
        "{present:?}"
    );
    assert!(zero.iter().all(|color| *color == zero[0]), "{zero:?}");
    assert_ne!(present[0], zero[0]);
    let written = fs::metadata(work.path("map.png")).unwrap().len();
    assert!(written < 10_000);
}
