//! The comparison as a bar chart.

use anyhow::anyhow;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::report::{POLICIES, Report};

const SIZE: (u32, u32) = (960, 480);
/// Bars of a trace, and the room between traces.
const GROUP: f64 = POLICIES.len() as f64 + 1.0;
/// Colours that also differ in lightness (Okabe and Ito).
const COLOURS: [RGBColor; POLICIES.len()] = [
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(150, 150, 150),
    RGBColor(0, 114, 178),
];

/// What bars are cut at, in times the best other policy's total.
const MOST: f64 = 2.0;

/// An SVG: each trace's costs in times the best other policy's, faults in a lighter shade on top of writing.
pub fn of(report: &Report) -> anyhow::Result<String> {
    let mut svg = String::new();
    draw(report, &mut svg).map_err(|error| anyhow!("can't draw: {error}"))?;
    Ok(svg)
}

fn draw(report: &Report, svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let width = GROUP * report.rows.len() as f64;
    let mut chart = ChartBuilder::on(&area)
        .margin(12)
        .margin_top(24)
        .x_label_area_size(32)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..width, 0.0..MOST * 1.5)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .disable_x_axis()
        .y_labels(6)
        .y_label_formatter(&|times| format!("{times:.1}"))
        .y_desc("time, in times the best policy's but adaptive (dark: writing, light: faults)")
        .light_line_style(TRANSPARENT)
        .draw()?;
    for (policy, (name, _)) in POLICIES.iter().enumerate() {
        let colour = COLOURS[policy];
        let mut bars = Vec::new();
        let mut cut = Vec::new();
        for (at, row) in report.rows.iter().enumerate() {
            let times = |time: std::time::Duration| time.div_duration_f64(row.best_other());
            let cost = &row.costs[policy];
            let (writing, total) = (times(cost.writing), times(cost.total()));
            let left = GROUP * at as f64 + policy as f64 + 0.5;
            let mut bar = |from: f64, to: f64, shade: ShapeStyle| {
                let corners = [(left, from.min(MOST)), (left + 0.9, to.min(MOST))];
                bars.push(Rectangle::new(corners, shade));
            };
            bar(0.0, writing, colour.filled());
            bar(writing, total, colour.mix(0.45).filled());
            if total > MOST {
                cut.push(((left + 0.45, MOST), format!("{total:.0} x")));
            }
        }
        chart
            .draw_series(bars)?
            .label(*name)
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 14, y + 5)], colour.filled()));
        let above = Pos::new(HPos::Center, VPos::Bottom);
        let style = ("sans-serif", 13).into_font().color(&BLACK).pos(above);
        for (top, label) in cut {
            let at = chart.backend_coord(&top);
            area.draw(&Text::new(label, (at.0, at.1 - 4), style.clone()))?;
        }
    }
    let below = Pos::new(HPos::Center, VPos::Top);
    let style = ("sans-serif", 15).into_font().color(&BLACK).pos(below);
    for (at, row) in report.rows.iter().enumerate() {
        let middle = GROUP * (at as f64 + 0.5);
        let at = chart.backend_coord(&(middle, 0.0));
        area.draw(&Text::new(
            row.name.clone(),
            (at.0, at.1 + 8),
            style.clone(),
        ))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE)
        .label_font(("sans-serif", 14))
        .draw()?;
    area.present()?;
    Ok(())
}
