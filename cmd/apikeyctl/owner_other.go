//go:build !unix

package main

import "io/fs"

func ownerOf(fs.FileInfo) string { return "another user" }
