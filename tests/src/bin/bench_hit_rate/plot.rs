//! The plot: panels of lines over named places, as SVG.

use std::fmt::Write as _;

/// Width of a panel; its height is [`HEIGHT`].
const WIDTH: f64 = 430.0;
const HEIGHT: f64 = 270.0;
/// Panels in a row.
const COLUMNS: usize = 2;
/// Told apart without colour too: each line has its own dashes.
const STYLES: [(&str, &str); 6] = [
    ("#0b6e4f", ""),
    ("#c1121f", "7 3"),
    ("#1d4ed8", "2 3"),
    ("#b45309", "9 3 2 3"),
    ("#6d28d9", "1 4"),
    ("#525252", "12 4"),
];

/// Values in percent over named places; a missing one leaves a gap.
pub struct Panel {
    pub title: String,
    pub below: &'static str,
    pub places: Vec<String>,
    pub lines: Vec<(String, Vec<f64>)>,
}

impl Panel {
    fn draw(&self, svg: &mut String, left: f64, top: f64) -> std::fmt::Result {
        let (x0, y0, width, height) = (left + 44.0, top + 34.0, WIDTH - 190.0, HEIGHT - 90.0);
        let x = |place: usize| {
            let steps = (self.places.len() - 1).max(1) as f64;
            x0 + 12.0 + (width - 24.0) * place as f64 / steps
        };
        let y = |percent: f64| y0 + height * (1.0 - percent / 100.0);
        writeln!(
            svg,
            r#"<text x="{x0}" y="{}" font-weight="bold">{}</text>"#,
            top + 18.0,
            self.title
        )?;
        for percent in [0.0, 25.0, 50.0, 75.0, 100.0] {
            let at = y(percent);
            writeln!(
                svg,
                r##"<line x1="{x0}" x2="{}" y1="{at}" y2="{at}" stroke="#ddd"/><text x="{}" y="{}" text-anchor="end">{percent}</text>"##,
                x0 + width,
                x0 - 6.0,
                at + 4.0
            )?;
        }
        for (place, name) in self.places.iter().enumerate() {
            let (x, y) = (x(place), y0 + height + 16.0);
            writeln!(svg, r#"<text x="{x}" y="{y}" text-anchor="middle">{name}</text>"#)?;
        }
        let (middle, under) = (x0 + width / 2.0, y0 + height + 34.0);
        let below = self.below;
        writeln!(
            svg,
            r##"<text x="{middle}" y="{under}" text-anchor="middle" fill="#555">{below}</text>"##
        )?;
        for (number, (name, values)) in self.lines.iter().enumerate() {
            let (colour, dashes) = STYLES[number % STYLES.len()];
            let points =
                values.iter().enumerate().map(|(place, v)| format!("{:.1},{:.1}", x(place), y(*v)));
            let points = points.collect::<Vec<_>>().join(" ");
            let style =
                format!(r#"stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}""#);
            writeln!(svg, r#"<polyline points="{points}" fill="none" {style}/>"#)?;
            for (place, value) in values.iter().enumerate() {
                let (x, y) = (x(place), y(*value));
                writeln!(svg, r#"<circle cx="{x:.1}" cy="{y:.1}" r="2.5" fill="{colour}"/>"#)?;
            }
            let (from, at) = (x0 + width + 10.0, y0 + 8.0 + 18.0 * number as f64);
            writeln!(
                svg,
                r#"<line x1="{from}" x2="{}" y1="{at}" y2="{at}" {style}/>"#,
                from + 26.0
            )?;
            writeln!(svg, r#"<text x="{}" y="{}">{name}</text>"#, from + 31.0, at + 4.0)?;
        }
        Ok(())
    }
}

/// All panels, in rows.
pub fn svg(panels: &[Panel]) -> Result<String, std::fmt::Error> {
    let rows = panels.len().div_ceil(COLUMNS);
    let (width, height) = (WIDTH * COLUMNS as f64, HEIGHT * rows as f64);
    let mut svg = String::new();
    writeln!(
        svg,
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">"#
    )?;
    writeln!(svg, r##"<rect width="{width}" height="{height}" fill="#fff"/>"##)?;
    for (number, panel) in panels.iter().enumerate() {
        let (column, row) = (number % COLUMNS, number / COLUMNS);
        panel.draw(&mut svg, WIDTH * column as f64, HEIGHT * row as f64)?;
    }
    writeln!(svg, "</svg>")?;
    Ok(svg)
}
