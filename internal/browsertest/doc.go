// Package browsertest has the tests of keystore/console in a real browser: a walk through all
// pages, with scripts and without, by mouse and by keyboard, the checks of axe-core, and
// screenshots. The package is a separate module, because its dependencies drive browsers.
//
// The tests start Chromium, and skip loudly without it: install the Debian package chromium. The
// variable CHROMIUM names another program. The checks of axe-core need the path in the variable
// AXE:
//
//	npm pack axe-core@4.14.1 && tar xzf axe-core-4.14.1.tgz
//	AXE=$PWD/package/axe.min.js go test ./...
//
// A violation of the content security policy, an error in the console of the browser, a request
// that fails, and a request to another host fail the test that has opened the page.
//
// To write the screenshots of the documentation again, and to look at them:
//
//	go test -run Pages -screenshots screenshots
package browsertest
