//! The table as a picture: `docs/disk-throughput.svg`.

use std::fmt::Write as _;

use colloquy_tests::cluster::repository;

const WIDTH: f64 = 900.0;
const PANEL_HEIGHT: f64 = 190.0;
const LEFT: f64 = 60.0;
const BAR_MAX: f64 = 26.0;
const COLOURS: [&str; 8] =
    ["#555555", "#888888", "#bbbbbb", "#0b6e99", "#4aa3c7", "#c77b30", "#9b59b6", "#6aa84f"];

/// Bars of one kind of work: for each size, one bar a name.
pub struct Panel<'a> {
    pub title: &'a str,
    /// GB/s; `None` where a store does not do that.
    pub groups: Vec<(u64, Vec<Option<f64>>)>,
}

/// Writes the picture.
pub fn draw(names: &[&str], panels: &[Panel<'_>]) -> anyhow::Result<()> {
    let height = 50.0 + PANEL_HEIGHT * panels.len() as f64;
    let mut svg = format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' \
         font-family='sans-serif' font-size='12'>\n<rect width='100%' height='100%' fill='white'/>\n"
    );
    for (number, name) in names.iter().enumerate() {
        let x = LEFT + 100.0 * number as f64;
        let colour = COLOURS[number % COLOURS.len()];
        writeln!(svg, "<rect x='{x}' y='12' width='12' height='12' fill='{colour}'/>")?;
        writeln!(svg, "<text x='{}' y='23'>{name}</text>", x + 17.0)?;
    }
    for (number, panel) in panels.iter().enumerate() {
        let top = 60.0 + PANEL_HEIGHT * number as f64;
        let bottom = top + PANEL_HEIGHT - 55.0;
        let rates = panel.groups.iter().flat_map(|(_, rates)| rates.iter().flatten());
        let most = rates.fold(0.1_f64, |most, rate| most.max(*rate));
        writeln!(
            svg,
            "<text x='{LEFT}' y='{}' font-weight='bold'>{}</text>",
            top - 8.0,
            panel.title
        )?;
        for share in [0.0, 0.5, 1.0] {
            let y = bottom - share * (bottom - top);
            let (end, label) = (WIDTH - 20.0, share * most);
            writeln!(svg, "<line x1='{LEFT}' y1='{y}' x2='{end}' y2='{y}' stroke='#ddd'/>")?;
            writeln!(
                svg,
                "<text x='{}' y='{}' text-anchor='end'>{label:.1}</text>",
                LEFT - 6.0,
                y + 4.0
            )?;
        }
        let group_width = (WIDTH - LEFT - 20.0) / panel.groups.len().max(1) as f64;
        let bar = (group_width / (names.len() as f64 + 1.0)).min(BAR_MAX);
        for (place, (mib, rates)) in panel.groups.iter().enumerate() {
            let x = LEFT + group_width * place as f64;
            for (number, rate) in rates.iter().enumerate() {
                let Some(rate) = rate else { continue };
                let (height, colour) =
                    (rate / most * (bottom - top), COLOURS[number % COLOURS.len()]);
                let (left, y, width) = (x + 6.0 + bar * number as f64, bottom - height, bar - 2.0);
                writeln!(
                    svg,
                    "<rect x='{left:.1}' y='{y:.1}' width='{width:.1}' height='{height:.1}' fill='{colour}'/>"
                )?;
            }
            let middle = x + 6.0 + bar * rates.len() as f64 / 2.0;
            writeln!(
                svg,
                "<text x='{middle:.1}' y='{}' text-anchor='middle'>{mib} MiB</text>",
                bottom + 16.0
            )?;
        }
    }
    svg.push_str("</svg>\n");
    Ok(std::fs::write(repository().join("docs/disk-throughput.svg"), svg)?)
}
