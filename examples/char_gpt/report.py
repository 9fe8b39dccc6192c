"""The page and the picture."""


def machine(device):
    return {}


def markdown(*a):
    return ""


def write_report(out):
    pass
