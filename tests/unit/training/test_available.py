"""What cgroups leave, from files as the two versions of them write."""

from pathlib import Path

from lamina.training.available import _cgroups

GIB = 2**30


def write(folder: Path, **files: str | int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n", encoding="utf-8")


def own(tmp_path: Path, *lines: str) -> Path:
    (tmp_path / "cgroup").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return tmp_path / "cgroup"


def test_version_2_leaves_what_the_limits_of_all_groups_above_leave(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    write(root)  # the root group has no limit
    write(root / "slice", memory__max=8 * GIB, memory__current=7 * GIB)
    write(root / "slice" / "job", memory__max=4 * GIB, memory__current=1 * GIB)
    assert _cgroups(root, own(tmp_path, "0::/slice/job")) == [3 * GIB, 1 * GIB]
    write(root / "slice" / "job", memory__max="max")
    assert _cgroups(root, own(tmp_path, "0::/slice/job")) == [1 * GIB]


def test_what_is_only_cache_is_not_used(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    group = root / "job"
    stat = f"anon {2 * GIB}\ninactive_file {GIB}\nactive_file 5"
    write(group, memory__max=4 * GIB, memory__current=3 * GIB, memory__stat=stat)
    assert _cgroups(root, own(tmp_path, "0::/job")) == [2 * GIB]
    write(group, memory__current=GIB // 2)  # the two files are read one after the other
    assert _cgroups(root, own(tmp_path, "0::/job")) == [4 * GIB]


def test_version_1_has_its_own_names_and_says_a_large_number_where_there_is_no_limit(tmp_path: Path) -> None:
    root, unlimited = tmp_path / "fs", 2**63 - 4096
    write(root / "memory", memory__limit_in_bytes=unlimited, memory__usage_in_bytes=9 * GIB)
    write(root / "memory" / "job", memory__limit_in_bytes=2 * GIB, memory__usage_in_bytes=GIB)
    write(root / "cpu" / "elsewhere", memory__limit_in_bytes=1, memory__usage_in_bytes=1)
    lines = ["12:cpu,cpuacct:/elsewhere", "5:hugetlb,memory:/job", "1:name=systemd:/job"]
    assert _cgroups(root, own(tmp_path, *lines)) == [1 * GIB]


def test_in_a_container_that_does_not_see_its_own_path_the_limit_is_that_of_the_root(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    write(root / "memory", memory__limit_in_bytes=2 * GIB, memory__usage_in_bytes=GIB)
    assert _cgroups(root, own(tmp_path, "5:memory:/docker/0123")) == [1 * GIB]


def test_where_both_versions_are_mounted_both_count(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    write(root / "memory" / "old", memory__limit_in_bytes=2 * GIB, memory__usage_in_bytes=GIB)
    write(root / "new", memory__max=8 * GIB, memory__current=GIB)
    assert _cgroups(root, own(tmp_path, "5:memory:/old", "0::/new")) == [1 * GIB, 7 * GIB]


def test_without_cgroups_or_their_files_there_is_no_limit(tmp_path: Path) -> None:
    assert _cgroups(tmp_path / "fs", tmp_path / "absent") == []
    assert _cgroups(tmp_path / "fs", own(tmp_path, "0::/job", "5:memory:/job")) == []
