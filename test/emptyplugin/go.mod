module github.com/edgeward/edgeward/test/emptyplugin

go 1.22
