from pipeline.storage.names import folder_name


def test_names_are_safe_as_folders():
    assert folder_name("my data/träin:1") == "my-data-tr-in-1"
    assert folder_name("../..") == "unnamed"
