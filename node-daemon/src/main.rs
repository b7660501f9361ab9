//! `bascule-node`: see the library's page.

fn main() -> std::process::ExitCode {
    bascule_node::node_main()
}
