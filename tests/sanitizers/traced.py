"""Cython's plugin for coverage, without the part of it that swallows signals (`make coverage`, which compiles this).

For every function and every line of the extension coverage asks the plugin something. In Python, each answer is a
function in which a signal that has come meanwhile is handled; if the handler raises, coverage takes that for a fault of
the plugin and disables it. Then Ctrl-C is lost, and so are all lines from there on. Compiled functions handle none.
"""

from Cython import Coverage

path_of_new_file = Coverage.CythonModuleTracer.dynamic_source_filename


def dynamic_source_filename(self, filename, frame):
    try:
        return self._file_path_map[frame.f_code.co_filename]
    except KeyError:
        return path_of_new_file(self, filename, frame)


def line_number_range(self, frame):
    return frame.f_lineno, frame.f_lineno


Coverage.CythonModuleTracer.dynamic_source_filename = dynamic_source_filename
Coverage.CythonModuleTracer.line_number_range = line_number_range
coverage_init = Coverage.coverage_init
