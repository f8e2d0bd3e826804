//! `kvctl top`: conversations by what they take, or by when they were last used.

use serde_json::Value;

use crate::client::Client;
use crate::table::{Side, bytes, count, number, print_json, table, text, when};

/// Longest name shown whole.
const NAME_CHARS: usize = 32;

#[derive(Debug, clap::Args)]
pub struct Top {
    /// How many.
    #[arg(long, short = 'n', default_value_t = 20)]
    limit: usize,
    /// What comes first.
    #[arg(long, value_enum, default_value = "bytes")]
    order: Order,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Order {
    /// What takes the most in host memory and on disk.
    Bytes,
    /// What was used last.
    Used,
}

impl Top {
    pub fn run(&self, client: &Client, json: bool) -> anyhow::Result<()> {
        let order = match self.order {
            Order::Bytes => "bytes",
            Order::Used => "used",
        };
        let path = format!("/conversations?limit={}&order={order}", self.limit);
        let list = client.get(&path)?;
        if json {
            return print_json(&list);
        }
        let lines = list["conversations"].as_array().map(Vec::as_slice).unwrap_or_default();
        let columns = [
            ("conversation", Side::Left),
            ("root", Side::Left),
            ("tokens", Side::Right),
            ("blocks", Side::Right),
            ("host", Side::Right),
            ("disk", Side::Right),
            ("used", Side::Right),
            ("", Side::Left),
        ];
        print!("{}", table(&columns, &lines.iter().map(row).collect::<Vec<_>>()));
        println!("{} of {} conversations", lines.len(), count(number(&list, "/total")));
        Ok(())
    }
}

fn row(line: &Value) -> Vec<String> {
    let tier = |tier: &str| match number(line, &format!("/{tier}/blocks")) {
        0 => "–".to_owned(),
        _ => bytes(number(line, &format!("/{tier}/bytes"))),
    };
    vec![
        name(line),
        text(line, "/root").chars().take(8).collect(),
        count(number(line, "/tokens")),
        count(number(line, "/blocks")),
        tier("host"),
        tier("disk"),
        when(number(line, "/used_ms")),
        notes(line),
    ]
}

/// The name, or the id where there is none; shortened, and on one line.
fn name(line: &Value) -> String {
    let name = text(line, "/name");
    if name.is_empty() {
        let id: String = text(line, "/id").chars().take(16).collect();
        return format!("(id {id})");
    }
    let clean = |c: char| if c.is_control() { '?' } else { c };
    let mut shown: String = name.chars().take(NAME_CHARS).map(clean).collect();
    if name.chars().count() > NAME_CHARS {
        shown.push('…');
    }
    shown
}

fn notes(line: &Value) -> String {
    let mut notes = Vec::new();
    if line["pinned_until_ms"].is_u64() {
        notes.push(format!("pinned, ends {}", when(number(line, "/pinned_until_ms"))));
    }
    if line["expires_ms"].is_u64() {
        notes.push(format!("expires {}", when(number(line, "/expires_ms"))));
    }
    notes.join("; ")
}
