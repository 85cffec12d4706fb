"""Cython's plugin for coverage, without the part of it that swallows signals (`make coverage`, which compiles this).

For every function and every line of the extension, coverage calls the plugin. A plugin in Python runs the handler of a
signal that has come meanwhile; if the handler raises, coverage treats that as an error of the plugin and disables it.
Then Ctrl-C is lost, and so are all lines from there on. Compiled functions run no signal handlers.
"""

from pathlib import Path

from Cython import Coverage

path_of_new_file = Coverage.CythonModuleTracer.dynamic_source_filename
reporter_of = Coverage.Plugin.file_reporter


def dynamic_source_filename(self, filename, frame):
    try:
        return self._file_path_map[frame.f_code.co_filename]
    except KeyError:
        return path_of_new_file(self, filename, frame)


def line_number_range(self, frame):
    return frame.f_lineno, frame.f_lineno


def file_reporter(self, filename):
    if not self._c_files_map:  # only this name leads to the C file, which names the chapters and leaves
        reporter_of(self, str(Path(filename).with_name("_epoll.pyx")))
    return reporter_of(self, filename)


Coverage.CythonModuleTracer.dynamic_source_filename = dynamic_source_filename
Coverage.CythonModuleTracer.line_number_range = line_number_range
Coverage.Plugin.file_reporter = file_reporter
coverage_init = Coverage.coverage_init
