//! `kvctl compact`: garbage goes back to the file system.

use hyper::Method;

use crate::client::Client;
use crate::table::{bytes, number, print_json};

pub fn run(client: &Client, as_json: bool) -> anyhow::Result<()> {
    let before = client.get("/status")?;
    let after = client.send(Method::POST, "/compact", None)?;
    if as_json {
        return print_json(&after);
    }
    println!(
        "files of the disk tier: {} before, {} after",
        bytes(number(&before, "/disk/physical_bytes")),
        bytes(number(&after, "/physical_bytes")),
    );
    Ok(())
}
