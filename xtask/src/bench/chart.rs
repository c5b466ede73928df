//! A bar chart of wall times, as SVG: one group for each data set and action, the peer's bar being 1.

use std::fmt::Write;

use super::report::Row;

const BAR: usize = 16;
const LEFT: usize = 330;
const WIDTH: usize = 560;
const COLOURS: [&str; 6] = ["#9aa5b1", "#1f6feb", "#c9d1d9", "#79b8ff", "#d0a98f", "#b8a9c9"];

/// Wall times as ratios to those of `base`.
pub fn bars(rows: &[Row], base: &str) -> String {
    let mut tools: Vec<&str> = Vec::new();
    for row in rows {
        if !tools.contains(&row.tool) {
            tools.push(row.tool);
        }
    }
    let mut body = String::new();
    let mut y = 60;
    let mut last = "";
    let mut last_action = "";
    // What was only counted has nothing to be compared with.
    let is_base = |row: &Row, other: &Row| other.tool == base && other.data == row.data && other.action == row.action;
    let compared = rows.iter().filter(|row| rows.iter().any(|other| is_base(row, other)));
    for row in compared {
        if (row.data.as_str(), row.action) != (last, last_action) {
            (last, last_action) = (&row.data, row.action);
            y += 14;
            let _ = writeln!(
                body,
                "<text x=\"8\" y=\"{}\" font-weight=\"bold\">{}: {}</text>",
                y + 12,
                row.data,
                row.action
            );
            y += BAR + 2;
        }
        let theirs = rows.iter().find(|other| is_base(row, other));
        let ratio = theirs.map_or(0.0, |theirs| row.cost.wall / theirs.cost.wall);
        let colour = COLOURS[tools.iter().position(|tool| *tool == row.tool).unwrap_or(0) % COLOURS.len()];
        let width = (ratio / 3.0).min(1.0) * WIDTH as f64;
        let _ = writeln!(
            body,
            "<text x=\"24\" y=\"{0}\">{1}</text><rect x=\"{LEFT}\" y=\"{2}\" width=\"{width:.0}\" height=\"{3}\" fill=\"{colour}\"/><text x=\"{4:.0}\" y=\"{0}\">{ratio:.2} ({5:.2} s)</text>",
            y + 12,
            row.tool,
            y + 1,
            BAR - 3,
            LEFT as f64 + width + 6.0,
            row.cost.wall
        );
        y += BAR;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"8\" y=\"24\" font-size=\"16\">Wall time, as a ratio to {base} (less is better)</text>\n{body}</svg>\n",
        LEFT + WIDTH + 120,
        y + 20
    )
}
